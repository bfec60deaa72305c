"""Models with adapters (PEFT), which are refused: their checkpoints could not be loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

MERGE = "merge it into its model first (merge_and_unload() of PEFT, then save_pretrained())"


def refuse_adapters(model: nn.Module) -> None:
    """ValueError, in one line: the model has adapters, also where PEFT put them into a model that it was given."""
    for name, module in model.named_modules():
        if hasattr(module, "peft_config") or type(module).__module__.partition(".")[0] == "peft":
            where = f" in {name}" if name else ""
            raise ValueError(f"model: expected one without adapters, got {type(module).__name__}{where}: {MERGE}")


def refuse_adapter_directory(path: Path) -> None:
    """ValueError, in one line: the directory holds an adapter."""
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path}: expected a model, got an adapter (adapter_config.json): {MERGE}")
