"""How TensorRT engines are run. The first two names, and the layout of the folder, are LightX2V's."""

from __future__ import annotations

from dataclasses import dataclass

from paravae.configs.fields import check_fields, flag_name, option
from paravae.configs.values import width_and_height

VAE_TYPES = ("pytorch", "tensorrt")
FLAVOURS = ("auto", "tensorrt", "tensorrt_rtx")
_WITHIN = "trt_vae_config."


@dataclass(frozen=True, kw_only=True)
class TrtVAEConfig:
    """Which TensorRT engines to run, and how. Whether they can be had is not asked here: where not, the runtime falls
    back to PyTorch, or raises if ``strict``."""

    trt_engine_path: str | None = option(
        None,
        "folder of the engines, as paravae engine build and LightX2V lay it out; a relative one, in a file too, "
        "is sought in the working directory; vae_type tensorrt needs it",
        stands_for="DIR",
    )
    multi_profile: bool = option(
        False,
        "true: the *_multi_profile engines, for any size within their ranges; "
        "false: static engines, each for one size, or for one rank's window of it",
    )
    max_resident_bytes: int | None = option(
        None,
        "bytes of engines that a rank keeps loaded, the least recently used going first and what runs staying; "
        "default: one encoder and decoder",
    )
    warm_up: tuple[str, ...] = option(
        (),
        "sizes in pixels, such as 1664x928,1328x1328, whose engines are loaded and run once beforehand",
        stands_for="WxH,WxH,...",
    )
    cuda_graph: bool = option(False, "record a CUDA graph for each shape that an engine runs, as many as cuda_graphs")
    flavour: str = option(
        "auto",
        "which TensorRT runs the engines: tensorrt, for data-centre GPUs; tensorrt_rtx, for RTX GPUs; "
        "auto: the one that they were built by",
        choices=FLAVOURS,
    )
    verify_hashes: bool = option(
        True, "compare each engine's file, and the weights it was built from, with the hashes in its manifest"
    )
    strict: bool = option(False, "raise where an engine cannot run, and not fall back to PyTorch")

    def __post_init__(self) -> None:
        check_fields(self, _WITHIN)
        if self.trt_engine_path is not None and not self.trt_engine_path.strip():
            raise ValueError(
                f"trt_engine_path ({flag_name(_WITHIN + 'trt_engine_path')}) is empty, needs the name of a folder"
            )
        if self.max_resident_bytes is not None and self.max_resident_bytes < 1:
            raise ValueError(
                f"max_resident_bytes ({flag_name(_WITHIN + 'max_resident_bytes')}) is {self.max_resident_bytes}, "
                "needs a positive number of bytes, or none for one encoder and decoder"
            )
        try:
            sizes = self.warm_up_sizes
        except ValueError as error:
            raise ValueError(f"warm_up ({flag_name(_WITHIN + 'warm_up')}): {error}") from None
        object.__setattr__(self, "warm_up", tuple(f"{width}x{height}" for width, height in dict.fromkeys(sizes)))

    @property
    def warm_up_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each."""
        return tuple(map(width_and_height, self.warm_up))

    def check_sizes(self, ratio: int) -> None:
        """Raise ValueError for a size to warm up that is no picture's, where a latent covers ``ratio`` pixels."""
        for size, (width, height) in zip(self.warm_up, self.warm_up_sizes, strict=True):
            if not width * height or width % ratio or height % ratio:
                raise ValueError(
                    f"warm_up ({flag_name(_WITHIN + 'warm_up')}) has {size}: "
                    f"width and height need to be positive multiples of {ratio}, the pixels a latent covers"
                )
