"""diffusers' pipelines, each with paravae's VAE and without: the same pictures, and back again to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paravae import QwenImageVAEConfig
from tests.builders import max_error
from tests.diffusers_cases import KINDS, diffusers, picture, pipeline

accelerate_library = pytest.importorskip("accelerate", reason="needs paravae[diffusers]")

from paravae.integrations import diffusers_vae  # noqa: E402
from paravae.integrations.pipelines import accelerate, paravae_vae_for  # noqa: E402


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The edit pipelines bring every picture to a megapixel, which takes a CPU long."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio, real=real: real(64 * 64, ratio))


@pytest.mark.parametrize("kind", KINDS)
def test_same_picture_and_restored_to_the_bit(kind: str) -> None:
    pipe = pipeline(kind)
    original, saved_as, before = pipe.vae, pipe.config["vae"], picture(pipe, kind)
    accelerated = accelerate(pipe)
    assert pipe.vae is accelerated.vae is pipe.components["vae"]
    is_wan = kind.startswith("video")
    assert type(pipe.vae) is (diffusers_vae.AutoencoderKLWan if is_wan else diffusers_vae.AutoencoderKLQwenImage)
    assert ("WanTransformer3DModel" in accelerated.not_fused) == is_wan
    assert 0 < max_error(picture(pipe, kind), before) <= 2e-5, "exactly the same: did paravae decode it?"
    assert pipe.vae.paravae.last_choice.mode == "single"
    accelerated.restore()
    assert pipe.vae is original
    assert pipe.config["vae"] == saved_as
    assert torch.equal(picture(pipe, kind), before)


def test_set_by_hand() -> None:
    pipe = pipeline()
    before = picture(pipe)
    pipe.vae = paravae_vae_for(pipe, QwenImageVAEConfig(engine="torch"))
    assert 0 < max_error(picture(pipe), before) <= 2e-5
    assert "forward" not in vars(pipe.transformer.norm_out), "paravae_vae_for leaves the transformer alone"


def test_a_batch_and_other_outputs() -> None:
    pipe = pipeline()
    options = {"num_images_per_prompt": 2}
    before, as_array = picture(pipe, **options), picture_of(pipe, "np")
    accelerate(pipe)
    assert before.shape == (2, 3, 48, 64)
    assert max_error(picture(pipe, **options), before) <= 2e-5
    pipe.vae.enable_slicing()
    assert max_error(picture(pipe, **options), before) <= 2e-5
    assert abs(picture_of(pipe, "np") - as_array).max() <= 2e-5
    latents = pipe("a cat", height=48, width=64, num_inference_steps=2, output_type="latent", return_dict=False)[0]
    assert latents.shape == (1, 12, 64)


def picture_of(pipe: diffusers.QwenImagePipeline, output_type: str) -> object:
    seed = torch.Generator().manual_seed(0)
    return pipe("a cat", height=48, width=64, num_inference_steps=2, generator=seed, output_type=output_type).images


@pytest.mark.parametrize("fuse", [None, True, False])
def test_compiled_transformer(fuse: bool | None) -> None:
    """Compiled whole, without a graph break, around the fused blocks; restored while it is compiled."""
    pipe = pipeline()
    before = picture(pipe)
    accelerated = accelerate(pipe, fuse=fuse)
    assert accelerated.not_fused == ("fuse=False" if fuse is False else "")
    assert ("forward" in vars(pipe.transformer.norm_out)) == (fuse is not False)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
    assert 0 < max_error(picture(pipe), before) <= 2e-5
    accelerated.restore()
    assert "forward" not in vars(pipe.transformer.norm_out)
    assert max_error(picture(pipe), before) <= 2e-5


def test_to_a_dtype_and_back() -> None:
    """The VAE that was there goes along, on the same memory; in bfloat16 pictures are as near to the truth as its."""
    pipe = pipeline()
    truth, original = picture(pipe), pipe.vae
    accelerated = accelerate(pipe)
    assert pipe.to(torch.bfloat16) is pipe
    assert {p.dtype for p in pipe.vae.parameters()} == {pipe.vae.dtype, original.dtype} == {torch.bfloat16}
    ours = picture(pipe)
    assert ours.dtype == torch.bfloat16
    accelerated.restore()
    theirs = picture(pipe)
    assert pipe.vae.dtype == torch.bfloat16
    assert max_error(ours, truth) <= 1.5 * max_error(theirs, truth)
    pipe.to(torch.float32)
    assert original.dtype == torch.float32
    with_both = pipeline()  # a VAE of higher precision than the rest, as Wan's pipelines are documented
    with_both.transformer.to(torch.bfloat16)
    accelerate(with_both)
    assert picture(with_both, prompt=None, negative_prompt=None, **embeds(torch.bfloat16)).dtype == torch.float32


def embeds(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    ones = torch.ones(1, 5, 16, dtype=dtype)
    return {"prompt_embeds": ones, "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)}


def test_model_offload_runs_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing moves far, but the hooks of decode and encode run, and in order."""
    moved: list[str] = []
    real = accelerate_library.hooks.CpuOffload.pre_forward

    def recording(self: object, module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        moved.append(type(module).__name__)
        return real(self, module, *args, **kwargs)

    pipe = pipeline()
    before = picture(pipe)
    accelerated = accelerate(pipe)
    monkeypatch.setattr(accelerate_library.hooks.CpuOffload, "pre_forward", recording)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        moved.clear()
        assert max_error(picture(pipe), before) <= 2e-5
        assert list(dict.fromkeys(moved)) == [
            "Qwen2_5_VLForConditionalGeneration",
            "QwenImageTransformer2DModel",
            "AutoencoderKLQwenImage",
        ]
    moved.clear()
    pipe.vae.encode(torch.zeros(1, 3, 1, 16, 16))
    assert moved == ["AutoencoderKLQwenImage"]
    with pytest.raises(ValueError, match=r"offloaded: call pipe\.remove_all_hooks\(\) first"):
        accelerated.restore()
    with pytest.raises(ValueError, match=r"as it was before"):
        accelerate(pipe)
    pipe.remove_all_hooks()
    accelerated.restore()
    assert torch.equal(picture(pipe), before)


@pytest.mark.cuda
def test_model_offload_moves_the_vae() -> None:
    pipe = pipeline().to(torch.bfloat16)
    accelerated = accelerate(pipe)
    before = picture(pipe.to("cuda")).cpu()
    pipe.enable_model_cpu_offload()
    for _ in range(3):
        assert max_error(picture(pipe).cpu(), before) <= 0.02
        assert pipe.vae.device.type == accelerated.original_vae.device.type == "cpu"


def test_other_ways_of_offloading_are_refused() -> None:
    pipe = pipeline("image to image")
    accelerated = accelerate(pipe)
    with pytest.raises(ValueError, match="does not support group offloading"):
        pipe.vae.enable_group_offload(torch.device("cpu"))
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"meta device.*use enable_model_cpu_offload"):
        pipe.vae.decode(torch.zeros(1, 16, 1, 2, 2))
    pipe.remove_all_hooks()
    accelerated.restore()
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        offload(device="cpu")
        with pytest.raises(ValueError, match=r"has hooks.*before enable_model_cpu_offload"):
            accelerate(pipe)
        pipe.remove_all_hooks()
    pipe.vae.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1, offload_type="block_level")
    with pytest.raises(ValueError, match="has hooks"):
        paravae_vae_for(pipe)


def test_saved_pipelines_load(tmp_path: Path) -> None:
    """An accelerated one loads without paravae; one whose VAE was set by hand loads with paravae's."""
    pipe = pipeline()
    before = picture(pipe)
    accelerated = accelerate(pipe)
    pipe.save_pretrained(tmp_path / "accelerated")
    loaded = diffusers.QwenImagePipeline.from_pretrained(tmp_path / "accelerated")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is diffusers.AutoencoderKLQwenImage
    assert max_error(picture(loaded), before) <= 1e-5  # its tensors lie elsewhere in memory, and sums differ by that
    weights = loaded.vae.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.vae.state_dict().items())
    accelerated.restore()
    pipe.vae = paravae_vae_for(pipe)
    pipe.save_pretrained(tmp_path / "by hand")
    loaded = diffusers.QwenImagePipeline.from_pretrained(tmp_path / "by hand", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is diffusers_vae.AutoencoderKLQwenImage
    assert max_error(picture(loaded), before) <= 2e-5


def test_made_with_it_and_made_from_it() -> None:
    """paravae's VAE given to a pipeline as it is made, and passed on to another."""
    pipe = pipeline()
    before = picture(pipe)
    parts = {**pipe.components, "vae": paravae_vae_for(pipe)}
    made = diffusers.QwenImagePipeline(**parts)
    made.set_progress_bar_config(disable=True)
    assert made.vae_scale_factor == 8
    assert max_error(picture(made), before) <= 2e-5
    other = diffusers.QwenImageImg2ImgPipeline.from_pipe(made, vae=made.vae)
    assert other.vae is made.vae
    assert picture(other, "image to image", prompt_embeds=torch.ones(1, 5, 16)).shape == (1, 3, 48, 64)


def test_what_is_left_alone_when_refused() -> None:
    pipe = pipeline("video")
    vae = pipe.vae
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        accelerate(pipe, fuse=True)
    assert pipe.vae is vae
    accelerated = accelerate(pipe)
    accelerated.restore()
    with pytest.raises(ValueError, match="is it restored"):
        accelerated.restore()
