"""Options that used to be elsewhere: a message about one ends with how it is spelt now."""

from __future__ import annotations

__all__ = ["hint"]

_SPARSIFY = {
    "sparsity", "pattern", "include", "exclude", "per-module", "exclude-lm-head", "include-lm-head", "allocation",
    "memory-bytes", "stream",
}  # fmt: skip
_LEARN = {
    "mode", "epochs", "batch", "budget", "schedule", "warm-up", "lora-rank", "lora-targets", "distillation", "state",
    "post-steps", "post-data", "restart",
}  # fmt: skip
_PRUNE = {
    "keep", "kinds", "reconstruct", "min-keep", "mix", "windows", "repeats", "hold-zeros", "steps", "round-to", "table",
}  # fmt: skip
_FLAGS = {"exclude-lm-head": "exclude_lm_head=true", "include-lm-head": "exclude_lm_head=false"}
_DIRECT = {
    "sparsify": {"sparsity", "pattern", "include", "exclude", "stream"},
    "learn": {"epochs", "batch", "lora-rank", "state", "post-data", "restart"},
}


def hint(command: str | None, option: str) -> str:
    """How an option of an earlier `fxprune prune` is spelt now; empty if it was none.

    Args:
        command: where it was used.
        option: as the user typed it.
    """
    name = option.lstrip("-")
    if command not in {"prune", "sparsify", "learn"}:
        return ""
    if name not in _SPARSIFY | _LEARN | _PRUNE:
        return "how much goes is said with --sparsity or --pattern" if (command, name) == ("sparsify", "ratio") else ""
    verb = "sparsify" if name in _SPARSIFY else "learn" if name in _LEARN else command
    if name in _DIRECT.get(verb, set()) and verb != command:
        return f"it is an option of fxprune {verb}: fxprune {verb} MODEL --{name} ..."
    text = f"--option {_FLAGS.get(name, name.replace('-', '_') + '=VALUE')}"
    where = "" if verb == command else f" of fxprune {verb}"
    return f"write {text}{where}; fxprune explain METHOD lists the options of a method"
