"""How adapters become one: `CombineConfig`, whose fields are the command line's flags.

A (r, in),  B (out, r),  s the scale of an adapter,  w the weight that the user gives it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from minilora.errors import ConfigError, check_types

CombinationType = Literal[
    "cat",
    "svd",
    "linear",
    "magnitude_prune",
    "magnitude_prune_svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
]
EXACT = ("cat", "svd")  # the sum itself, and its best approximation; all others change what is summed


@dataclass(frozen=True)
class CombineConfig:
    """How adapters become one. Field names, and those of the types, are those of PEFT's `add_weighted_adapter`.

        cat              the sum, exactly; its rank is the sum of the ranks
        svd              the sum, cut to a rank or to a share of its energy
        linear           A = Σ ±√|w s|·Aᵢ and B = Σ √|w s|·Bᵢ; not the sum: B A also has Bᵢ Aⱼ of different adapters
        magnitude_prune  a sum of which each part keeps its largest numbers
        ties             the same, and of each number only the parts of the sign that has more behind it, averaged
        dare_linear      a sum of which each part keeps random numbers, the larger for that
        dare_ties        the same, with the signs of ties

    The last four work on A and on B, as `linear` does and with its error; ending in `_svd`, on the ΔW, which are
    formed one module at a time, and cut.

    Raises:
        ConfigError: values of the wrong type, or else values that cannot work or have no effect; all of them in one
            message.
    """

    combination_type: CombinationType = field(
        default="cat",
        metadata={
            "help": "cat is the exact sum, svd the sum cut to a rank; ties, dare_… and magnitude_prune drop parts"
        },
    )
    svd_rank: int | None = field(
        default=None, metadata={"help": "rank to cut to, for types in svd (unset: the largest of the adapters')"}
    )
    svd_energy: float | None = field(
        default=None, metadata={"help": "or: cut each module to the least rank that keeps this share of its squares"}
    )
    density: float | None = field(default=None, metadata={"help": "share of the numbers to keep, for types that drop"})
    majority_sign_method: Literal["total", "frequency"] = field(
        default="total", metadata={"help": "signs of ties: by the sum of the numbers, or by how many there are"}
    )
    seed: int = field(default=0, metadata={"help": "of what dare drops"})

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        bad = []
        for name in ("svd_rank", "svd_energy"):
            if getattr(self, name) is not None and not self.is_cut:
                bad.append(f"{name}: without effect; {self.combination_type!r} cuts nothing, give a type in svd")
        if self.svd_rank is not None and self.svd_rank < 1:
            bad.append(f"svd_rank is {self.svd_rank!r}, need a whole number of at least 1")
        if self.drops != (self.density is not None):
            bad.append(f"density: {self.combination_type!r} " + ("needs one" if self.drops else "drops nothing"))
        for name in ("svd_energy", "density"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                bad.append(f"{name} is {value!r}, need a number above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            bad.append(f"seed is {self.seed!r}, need a whole number from 0 to below 2⁶³")
        if bad:
            raise ConfigError("CombineConfig: " + "; ".join(bad))

    @property
    def is_cut(self) -> bool:
        """Is the result cut by a singular value decomposition?"""
        return self.combination_type.endswith("svd")

    @property
    def drops(self) -> bool:
        """Are numbers left out of what is summed?"""
        return self.combination_type not in (*EXACT, "linear")
