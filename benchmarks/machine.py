"""What a result was measured on and with: as ``paravae bench`` says it."""

from paravae.launch.machine import describe

__all__ = ["describe"]
