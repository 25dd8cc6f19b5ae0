"""Every hyperparameter of FRUGAL: declared, documented and checked once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from frugal_dist.projection.blocks import ORDERS as BLOCK_ORDERS
from frugal_dist.projection.products import MATMULS
from frugal_dist.projection.registry import PROJECTIONS, family, options_of_others
from frugal_dist.projection.shapes import SIDE_CHOICES
from frugal_dist.projection.svd import METHODS as SVD_METHODS
from frugal_dist.update.lines import COMBINES, Treatment
from frugal_dist.update.moment_storage import FORMS, SMALL, Form
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

NOW, REFRESH, NEVER = "now", "refresh", "never"
"""When a step takes up a hyperparameter that was changed in ``param_groups`` while training.

NOW: at the next step. REFRESH: at each matrix' next refresh. NEVER: where state depends on it (``changes.depends_on``),
the step is refused; elsewhere it means nothing, or counts from the next random number (``seed`` of svd and random).
"""


def _choice(default: str, taken_up: str, allowed: Collection[str]) -> Any:
    """A hyperparameter that is one of a few words."""
    return field(default=default, metadata={"taken_up": taken_up, "choices": allowed})


def _number(default: float, taken_up: str, low: float = 0.0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"taken_up": taken_up, "number": (low, high)})


def _integer(default: int, taken_up: str, low: int) -> Any:
    return field(default=default, metadata={"taken_up": taken_up, "integer": low})


@dataclass(frozen=True, kw_only=True)
class FrugalConfig:
    """The hyperparameters of one parameter group (FRUGAL, arXiv 2411.07837, Algorithms 1-5).

    Args:
        lr: step size of the regular parameters; projected ones use ``lr * projected_lr_scale``. At least 0.
        betas: AdamW's or Lion's, each at least 0 and below 1; None means the rule's own: (0.9, 0.999), Lion
            (0.9, 0.99).
        eps: AdamW's epsilon, added to the root of the second moment.
        weight_decay: decoupled, applied first, with the unscaled ``lr`` (arXiv 1711.05101).
        density: rho, the share of a matrix that is updated with state, 0 to 1; of ``blockwise`` the share of the
            matrices.
        update_gap: T, updates between two projector refreshes, at least 1.
        projection: how the state-full part is chosen: "svd" (GaLore, arXiv 2403.03507), "dct" (arXiv 2505.17967),
            "random" (orthonormal), "gaussian" (APOLLO, arXiv 2412.05270), "randperm" (one-hot columns),
            "columns", "rows", "randk" (entries), or "blockwise" (whole matrices: BAdam, arXiv 2404.02827).
        side: of the basis projections: "std" (right if rows >= columns, else left), "reverse_std", "right", "left",
            "full".
        block_order: the order in which ``blockwise`` makes whole matrices state-full: "random", "ascending",
            "descending", "mirror".
        state_full: the rule of the state-full part: "adamw", "lion" (arXiv 2302.06675), "sgdm", or, of whole matrices,
            "muon" (K. Jordan 2024, kellerjordan.github.io/posts/muon) or "normalized_momentum", the average of SCALE's
            head (arXiv 2506.16659).
        state_free: the rule of the rest: "sign", "sgd", "none", or one that needs whole rows, columns or matrices:
            "softsign" (arXiv 2605.31371), "normalized" and "normalized_columns" (SCALE, arXiv 2506.16659), "sinkhorn"
            (SinkGD, arXiv 2502.06742), "scaled" (Fira, arXiv 2410.01623), "racs" (arXiv 2502.07752).
        combine: how the two parts make a step: "add", or as APOLLO (arXiv 2412.05270) has it: the whole gradient,
            "scale"d line by line, or "scale_matrix" with one factor, by how the state-full rule changes the norms of
            its part. There is no rest then.
        growth_limit: by how much the norm of what whole lines are stepped with may grow from step to step (Fira and
            APOLLO: 1.01), at least 1; 0 turns it off.
        momentum: of "sgdm", torch.optim.SGD's rule, and of the averages of "muon", "normalized_momentum" and "racs".
        moments: how the state-full rule's moments are kept, of regular parameters too: "full" (fp32, fp64 for fp64
            weights), or "8bit" (arXiv 2110.02861): codes of a byte, a scale for each 256 entries of a row. Regular
            parameters of fewer than 4096 entries stay full.
        projected_lr_scale: s, scales both parts of a projected matrix.
        state_free_lr_scale: s_free, scales the state-free part once more.
        on_refresh: what becomes of the state at a refresh: "reset", "keep", or "project" into the new basis.
        svd_method: how the projector of "svd" is found. "exact": a full SVD in fp32 (fp64 for fp64 gradients);
            "subspace": a few rounds of subspace iteration from the old projector, several times faster, nearly the
            same; "gram64": eigenvectors of the Gram matrix in fp64.
        basis_dtype: how projectors are kept between refreshes: "full" (fp32, fp64 for fp64 weights) or "bf16", half
            the bytes, but several percent of the residual's signs come out otherwise.
        matmul: of the step's products with a basis: "fp32", or "bf16x3": three of bf16 parts on tensor cores, faster on
            GPUs, with fp32's signs but for about one in ten thousand. fp64 stays fp64.
        rounding: of updated bf16 weights that have no fp32 master: "nearest"; "stochastic", which is right on average
            also where a step is smaller than what bf16 resolves; or "remainder": 16 more bits of each weight in the
            state make it exact fp32.
        refresh_schedule: "together" (the paper), or "staggered": matrices take turns within update_gap.
        compute_layout: where basis projections compute when storage is sharded: "auto" picks by cost, "cut" and
            "owner" say it.
        residual_threshold: relative size below which a residual row (column for a left basis) counts as rounding
            noise and is not stepped; 0 turns it off.
        seed: of the random selections, a whole number, at least 0.
        lr_scale: the old name of ``projected_lr_scale``, known to constructors and JSON. In parameter groups that is a
            key of timm and BEiT, whose schedules put it into lr.

    Raises:
        ValueError: naming the key, for a value of the wrong type, out of its limits or not among the choices, and for
            options that do not go together.
    """

    lr: float = _number(1e-3, NOW)
    betas: tuple[float, float] | None = field(default=None, metadata={"taken_up": NOW})
    eps: float = _number(1e-8, NOW)
    weight_decay: float = _number(0.0, NOW)
    density: float = _number(0.25, REFRESH, high=1.0)
    update_gap: int = _integer(200, NOW, low=1)
    projection: str = _choice("svd", NEVER, PROJECTIONS)
    side: str = _choice("std", NEVER, SIDE_CHOICES)
    block_order: str = _choice("random", NEVER, BLOCK_ORDERS)
    state_full: str = _choice("adamw", NEVER, STATE_FULL)
    state_free: str = _choice("sign", NOW, STATE_FREE)
    combine: str = _choice("add", NEVER, COMBINES)
    growth_limit: float = _number(0.0, NEVER)
    momentum: float = _number(0.9, NOW, high=1.0)
    moments: str = _choice("full", NEVER, FORMS)
    projected_lr_scale: float = _number(1.0, NOW)
    state_free_lr_scale: float = _number(1.0, NOW)
    on_refresh: str = _choice("reset", REFRESH, ("reset", "keep", "project"))
    svd_method: str = _choice("exact", REFRESH, SVD_METHODS)
    basis_dtype: str = _choice("full", REFRESH, ("full", "bf16"))
    matmul: str = _choice("fp32", NOW, MATMULS)
    rounding: str = _choice("nearest", NOW, ("nearest", "stochastic", "remainder"))
    refresh_schedule: str = _choice("together", NOW, ("together", "staggered"))
    compute_layout: str = _choice("auto", NEVER, ("auto", "cut", "owner"))
    residual_threshold: float = _number(0.0, NOW)
    seed: int = _integer(0, NEVER, low=0)
    lr_scale: InitVar[float | None] = None

    def __post_init__(self, lr_scale: float | None) -> None:
        if lr_scale is not None:
            object.__setattr__(self, "projected_lr_scale", lr_scale)
        for key, allowed in CHOICES.items():
            check_choice(key, getattr(self, key), allowed)
        betas = STATE_FULL[self.state_full].betas if self.betas is None else _pair_of_betas(self.betas)
        object.__setattr__(self, "betas", betas)
        for key, (low, high) in _NUMBERS.items():
            object.__setattr__(self, key, _as_number(key, getattr(self, key), low, high))
        for key, least in _INTEGERS.items():
            object.__setattr__(self, key, _as_integer(key, getattr(self, key), least))
        self._check_lines()
        self._check_moments()
        for key, one in options_of_others(self.projection):
            value = getattr(self, key)
            if value != _FIELDS[key].default:
                raise ValueError(
                    f"{key}={value!r} belongs to projection={one.name!r}, but projection={self.projection!r} "
                    f"{one.own[key]}. Leave {key} out, or use projection={one.name!r}."
                )

    def _check_moments(self) -> None:
        for moment in STATE_FULL[self.state_full].moments:
            if self.form.blocky and moment.signed is None:
                raise ValueError(
                    f"moments={self.moments!r}: state_full={self.state_full!r} does not say which values codes of its "
                    f"{moment.name} stand for, so these are kept in full. Leave moments out, or use another state_full."
                )

    def _check_lines(self) -> None:
        """What needs whole lines goes with bases, and with all or nothing of columns or rows."""
        if STATE_FREE[self.state_free].scaled and self.density == 0.0:
            raise ValueError(
                f"state_free={self.state_free!r} scales the rest as the state-full part is scaled, and density=0 has "
                "none. Raise density, or use another state_free."
            )
        if self.combine != "add" and (self.density == 0.0 or STATE_FREE[self.state_free].lines is not None):
            raise ValueError(
                f"combine={self.combine!r} scales the whole gradient as the state-full part is scaled: it needs a "
                f"density above 0 (now {self.density:g}), and leaves no rest to state_free={self.state_free!r}."
            )
        if self.combine == "add" and self.density > 0.0 and not PROJECTIONS[self.projection].orthonormal:
            raise ValueError(
                f"projection={self.projection!r} has columns that are not orthonormal, so that no rest is left over: "
                "it goes with combine='scale' or 'scale_matrix'."
            )
        if 0.0 < self.growth_limit < 1.0 or (self.growth_limit > 0.0 and not self._free_lines):
            raise ValueError(
                f"growth_limit={self.growth_limit:g} must be 0 or at least 1, and limits what state_free rules of "
                f"whole lines (scaled, racs, ...) or combine='scale' step with, not state_free={self.state_free!r}."
            )
        if self.by_lines and family(self) != "basis":
            full = not STATE_FULL[self.state_full].elementwise
            rule = f"state_full={self.state_full!r} updates whole matrices"
            if not full:
                key = "combine" if self.combine != "add" else "state_free"
                rule = f"{key}={getattr(self, key)!r} needs whole rows or columns"
            raise ValueError(
                f"{rule}: it needs a projection with a basis, not projection={self.projection!r} with "
                f"density={self.density:g}." + (" density=1 of columns or rows will do." if full else "")
            )

    # What follows from the fields, asked for by every matrix at every step.

    @cached_property
    def by_lines(self) -> bool:
        """Whether a rule needs whole lines or whole matrices, so that it computes where these are whole."""
        return self._free_lines or (not STATE_FULL[self.state_full].elementwise and self.density > 0)

    @cached_property
    def _free_lines(self) -> bool:
        return self.combine != "add" or STATE_FREE[self.state_free].lines is not None

    @cached_property
    def form(self) -> Form:
        """How moments are kept."""
        return FORMS[self.moments]

    @cached_property
    def treatment(self) -> Treatment:
        """What becomes of the rest by rules that need lines."""
        return Treatment(STATE_FREE[self.state_free], self.combine, self.growth_limit)

    @cached_property
    def undivided(self) -> bool:
        """Whether a rule needs whole matrices, and not only sums over what lies elsewhere."""
        return not STATE_FULL[self.state_full].elementwise or STATE_FREE[self.state_free].averages is not None

    @cached_property
    def keeps(self) -> tuple[str, ...]:
        """What is kept for the rest, see ``step.state.FREE``."""
        return (*STATE_FREE[self.state_free].keeps, *(("free_norm",) if self.growth_limit > 0.0 else ()))

    @cached_property
    def free_side(self) -> str:
        """The side of layouts that suit the state-free rule, where there is no basis."""
        return STATE_FREE[self.state_free].free_side

    @cached_property
    def beta_pair(self) -> tuple[float, float]:
        """The betas, resolved."""
        assert self.betas is not None
        return self.betas


_FIELDS = {one.name: one for one in fields(FrugalConfig)}
HYPERPARAMETERS = tuple(_FIELDS)


def _declared(entry: str) -> dict[str, Any]:
    return {key: one.metadata[entry] for key, one in _FIELDS.items() if entry in one.metadata}


CHOICES: dict[str, Collection[str]] = _declared("choices")
_NUMBERS: dict[str, tuple[float, float]] = _declared("number")
_INTEGERS: dict[str, int] = _declared("integer")
TAKEN_UP: dict[str, str] = _declared("taken_up")


def for_regular(config: FrugalConfig, shape: Sequence[int] = ()) -> FrugalConfig:
    """The settings of a group's regular parameters, of which one has this whole ``shape``: they may be cut anywhere,
    where a rule of whole matrices does not go, and take another one then. The same object for all that are alike.
    """
    return _regular(config, config.form.blocky and math.prod(shape) < SMALL)


@lru_cache(maxsize=64)
def _regular(config: FrugalConfig, small: bool) -> FrugalConfig:
    rule = STATE_FULL[config.state_full]
    changed = {} if rule.elementwise or not rule.regular else {"state_full": rule.regular}
    changed |= {"moments": "full"} if small else {}
    return replace(config, **changed) if changed else config  # type: ignore[arg-type]


def config_from(options: Mapping[str, Any]) -> FrugalConfig:
    """The checked configuration of a parameter group; keys that are no hyperparameters are ignored."""
    return FrugalConfig(**{key: options[key] for key in HYPERPARAMETERS if key in options})


OLD_NAMES = {"lr_scale": "projected_lr_scale"}


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of a constructor under their present names. ValueError for one that is given under both."""
    present = {OLD_NAMES.get(key, key): value for key, value in options.items()}
    for old, new in OLD_NAMES.items():
        if old in options and new in options:
            raise ValueError(f"{old} is the old name of {new}: give one of them.")
    return present


def saved_group(group: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group as an earlier version saved it, under the names of this one.

    ``present``: the same group now. A key of an old name in it is somebody else's, then as now.
    """
    ours = "state_free_lr_scale" in group and "projected_lr_scale" not in group
    names = {key: OLD_NAMES.get(key, key) if ours and key not in present else key for key in group}
    return {names[key]: value for key, value in group.items() if key != "param_names"}


def without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with our defaults in place of "auto", which configs say for what the Trainer may fill in."""
    defaults = {key: one.default for key, one in _FIELDS.items()}
    return {
        key: defaults[key] if isinstance(value, str) and value == "auto" else value for key, value in options.items()
    }


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """ValueError unless ``value`` is one of ``allowed``; suggests the closest."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is not known. Use one of {', '.join(allowed)}.{_suggestion(value, allowed)}")


def unknown_keys(given: Iterable[str], known: Iterable[str]) -> str:
    """What to say about the keys of ``given`` that are not in ``known``: all of them, each with the closest."""
    known = tuple(known)
    said = [f"unknown key {key!r}.{_suggestion(key, known)}" for key in given if key not in known]
    return " ".join([*said, f"Known keys: {', '.join(sorted(known))}."]) if said else ""


def _suggestion(value: object, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(allowed), n=3, cutoff=0.5)
    close = sorted(near, key=lambda one: not one.startswith(str(value)))  # adam is adamw rather than badam
    return f" Did you mean {close[0]!r}?" if close else ""


def python_value(value: Any) -> Any:
    """A number of torch or NumPy as Python's, a list as a tuple: schedules and JSON put them into groups."""
    if isinstance(value, (list, tuple)):
        return tuple(python_value(entry) for entry in value)
    single = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if single else value


def _as_number(key: str, value: Any, low: float, high: float) -> float:
    given = python_value(value)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError(f"{key}={value!r} must be a number, not {type(value).__name__}.")
    number = float(given)
    if not low <= number <= high or not math.isfinite(number):
        limit = f"between {low:g} and {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{key}={value!r} must be {limit}.")
    return number


def _as_integer(key: str, value: Any, low: int) -> int:
    given = python_value(value)
    numeric = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    if not numeric or int(given) != given or int(given) < low:
        raise ValueError(f"{key}={value!r} must be a whole number, at least {low}.")
    return int(given)


def _pair_of_betas(betas: Any) -> tuple[float, float]:
    pair: tuple[Any, ...] = python_value(betas) if isinstance(betas, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(b, (int, float)) and 0.0 <= b < 1.0 for b in pair):
        raise ValueError(f"betas={betas!r} must be two numbers, each at least 0 and below 1.")
    return float(pair[0]), float(pair[1])
