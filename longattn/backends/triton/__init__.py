"""The Triton backend: every feature on every GPU that Triton compiles for. Others import `backend` alone."""
