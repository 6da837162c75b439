"""paravae in other people's runtimes: SGLang, diffusers."""
