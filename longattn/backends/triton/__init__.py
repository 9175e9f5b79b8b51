"""The Triton backend: every feature on every GPU that Triton compiles for. `backend` is the only module that others import."""
