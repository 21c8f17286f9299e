"""What the harness raises."""


class KernelError(AssertionError):
    """A kernel failed; `found_by` is the pass that noticed: types, run, asan or tsan."""

    def __init__(self, found_by: str, kernel: str, message: str) -> None:
        super().__init__(f"{found_by}: {kernel}: {message}")
        self.found_by = found_by


class ToolchainError(RuntimeError):
    """The emulator can't be built on this machine."""
