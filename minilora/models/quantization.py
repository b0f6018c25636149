"""Which linears of a model are quantized, and how: `QuantizeConfig`, whose fields are the command line's flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minilora.errors import ConfigError, check_types, option

Quantize = Literal["none", "nf4"]
Target = Literal["original", "dequantized", "requantized"]  # what adapters are merged into


@dataclass(frozen=True)
class QuantizeConfig:
    """How the weights of a base model are held.

    Raises:
        ConfigError: a value that is not supported.
    """

    quantize: Quantize = option("none", "hold the base model's linears in four bits a weight, all but the head")
    double_quant: bool = option(True, "quantize the scales, too: 4.127 bits a weight instead of 4.5")
    quantize_skip: tuple[str, ...] = option(
        (), "modules that stay dense: paths or parts of them, such as down_proj or layers.0"
    )

    def __post_init__(self) -> None:
        names = self.quantize_skip.split(",") if isinstance(self.quantize_skip, str) else self.quantize_skip
        check_types(QuantizeConfig, {**vars(self), "quantize_skip": names})
        object.__setattr__(self, "quantize_skip", tuple(sorted({name.strip() for name in names})))

    @classmethod
    def of(cls, value: QuantizeConfig | Quantize | None) -> QuantizeConfig:
        """A config as it is, or that of a format's name; None is "none"."""
        return value if isinstance(value, cls) else cls(value or "none")  # type: ignore[arg-type]

    def chosen(self, linears: Sequence[str]) -> list[str]:
        """Those of the linears (paths) that are to be quantized.

        Raises:
            ConfigError: an entry of `quantize_skip` names none of them.
        """
        if self.quantize == "none":
            return []
        for entry in self.quantize_skip:
            if not any(_names(entry, path) for path in linears):
                kinds = sorted({path.rpartition(".")[2] for path in linears})
                raise ConfigError(f"quantize_skip {entry!r} names no linear module; the model's end in {kinds}")
        return [path for path in linears if not any(_names(entry, path) for entry in self.quantize_skip)]


def shortest_names(chosen: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Names for some of the modules (paths): their last components if those mean just them, else the paths."""
    endings = {path.rpartition(".")[2] for path in chosen}
    meant = {path for path in modules if path.rpartition(".")[2] in endings}
    return sorted(endings) if meant == set(chosen) else sorted(chosen)


def _names(entry: str, path: str) -> bool:
    """Is it the path, or whole components of it that follow each other?"""
    return f".{entry}." in f".{path}."
