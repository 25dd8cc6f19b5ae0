"""class Frugal: parameter groups, binding to the engine, the order of a step. Everything else is below."""

from __future__ import annotations

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from frugal_dist import engines
from frugal_dist.config import (
    HYPERPARAMETERS,
    OLD_NAMES,
    FrugalConfig,
    config_from,
    renamed,
    without_auto,
)
from frugal_dist.engines.hooks import dcp_does_without_names, innermost, on_innermost, own
from frugal_dist.engines.units import refuse_release, units_of
from frugal_dist.notices import notice, tell
from frugal_dist.parameters.changes import Seen, as_made, check_sizes, follow_cycles, follow_replaced, settle
from frugal_dist.parameters.groups import (
    NAMES,
    Saved,
    arranged,
    as_groups,
    check_group_keys,
    check_unique,
    members_of,
    read_groups,
    tables_in,
    without_foreign,
)
from frugal_dist.parameters.names import Choice
from frugal_dist.parameters.split import (
    ParameterInfo,
    check_patterns,
    clean_name,
    matches,
    report,
    selection_advice,
)
from frugal_dist.parameters.summary import StateBytes, bytes_by_name, state_bytes, summary
from frugal_dist.projection.numerics import full_precision
from frugal_dist.saving import copying
from frugal_dist.saving import state_dict as saved_state
from frugal_dist.sharding.collectives import agree_max, ranks_of, speaks, together
from frugal_dist.sharding.shard import ParamSpec
from frugal_dist.step.decide import decide, stepping
from frugal_dist.step.inputs import StepInputs, ensure_state, step_inputs, step_regular
from frugal_dist.step.matrices import step_matrices
from frugal_dist.step.refresh import refresh
from frugal_dist.step.release import HALF, Release
from frugal_dist.step.runtime import Runtime
from frugal_dist.step.statistics import RefreshStats
from frugal_dist.update.rules import STATE_FULL

BUCKET_BYTES = 64 * 2**20
"""Bound of one packed exchange, over all ranks; peak scratch is up to three times that."""

CAPTURED = (
    "Frugal.step() cannot be captured in a CUDA graph: replays would repeat this step's rates, counts and projectors. "
    "Capture forward and backward alone."
)

NO_GRADIENTS = (
    "step() found no gradient on any parameter of any rank, so nothing is updated. Was backward() called? If the "
    "optimizer was built before fully_shard(model), it holds the parameters that fully_shard has replaced: build it "
    "afterwards."
)

REPLACED = (
    "The optimizer's parameters are others than at frugal_dist.step_in_backward(model, optimizer), so no gradient was "
    "stepped in backward. Call it after fully_shard(model), accelerator.prepare(...) or whatever else replaces them."
)


def _patterns(given: Sequence[str] | str | None) -> Sequence[str] | None:
    """Name patterns as a list; JSON configs say "auto" for none."""
    if isinstance(given, str):
        return None if given == "auto" else [given]
    return given


LOADED = ("state", "param_groups", "_groups", "_settled", "_loaded", "_runtime", "_before", "_started", "_checked")
"""What a load replaces, and a load that is refused puts back."""


class Frugal(Optimizer):
    """FRUGAL (Zmushko et al., ICML 2025, arXiv 2411.07837), the same on every engine and number of ranks.

    Each projected matrix is updated by a state-full rule on a low-rank or coordinate part of its gradient and by a
    state-free rule on the rest; all other parameters by the state-full rule alone.

    Args:
        params: ``model.named_parameters()``, or torch-style groups whose members are tensors or (name, tensor) tuples.
            A group's ``"projected": True/False`` decides for its members, otherwise their names decide; any
            hyperparameter may be set per group. ``split_parameters`` chooses by module.
        lr: step size of the regular parameters; projected ones use ``lr * projected_lr_scale``.
        betas: AdamW's or Lion's; None means the rule's own: (0.9, 0.999), Lion (0.9, 0.99).
        eps: AdamW's epsilon.
        weight_decay: decoupled, applied first, with the unscaled ``lr``.
        density: the share of each matrix that is updated with state, 0 to 1 (``blockwise``: of the matrices).
        update_gap: updates between two projector refreshes.
        projection: how that share is chosen: "svd", "dct", "random", "gaussian" (APOLLO's), "randperm", "columns",
            "rows", "randk" or "blockwise".
        side: of svd, dct, random and randperm: "std" (right if rows >= columns, else left), "reverse_std", "right",
            "left", "full".
        block_order: in which order ``blockwise`` makes whole matrices state-full: "random", "ascending", "descending",
            "mirror".
        state_full: the rule of the state-full part and of regular parameters: "adamw", "lion" or "sgdm"; of projected
            matrices also "muon" or "normalized_momentum", computed by their owners, while regular ones take AdamW.
        state_free: the rule of the rest: "sign", "sgd", "none"; "softsign", "normalized" (rows), "normalized_columns",
            "sinkhorn", "scaled" (as the state-full part is) or "racs", with a basis or density 0.
        combine: "add" both parts, or (APOLLO) "scale" the whole gradient line by line, or by one factor
            ("scale_matrix"), as the state-full rule scales its part.
        growth_limit: by how much the norm of what rules of whole lines step with may grow from step to step; 0: off.
        momentum: of "sgdm", "muon", "normalized_momentum" and of the averages of "racs".
        moments: how moments are kept, of regular parameters too: "full", or "8bit", by blocks of 256 entries of a row.
        projected_lr_scale: scales both parts of a projected matrix' step.
        state_free_lr_scale: scales the state-free part once more; 1 for pre-training, 0.1 for fine-tuning.
        on_refresh: what becomes of the moments at a refresh: "reset", "keep", or "project" into the new basis.
        svd_method: how svd's basis is computed: "exact", "subspace" (several times faster, nearly as good) or
            "gram64".
        basis_dtype: of bases between refreshes: "full" or "bf16".
        matmul: of the step's products with a basis: "fp32" or "bf16x3" (three products of bf16 parts, on GPUs).
        rounding: of bf16 weights without fp32 masters: "nearest", "stochastic", or "remainder", which keeps what is
            rounded off in the state: 2 bytes each, and the steps are those of fp32 masters.
        refresh_schedule: "together" (the paper), or "staggered": matrices take turns within ``update_gap``.
        compute_layout: where sharded bases compute: "auto" (by cost), "cut" or "owner".
        residual_threshold: relative size below which a residual's row (column for a left basis) counts as rounding
            noise and is not stepped; 0 turns it off.
        shard_state: whether replicas share the low-rank state. "auto": yes, except where checkpoints keep rank 0's
            state only: under DeepSpeed stage 0, and under DDP of Accelerate, the Trainer or Lightning.
        process_group: the ranks that hold replicas of ordinary tensors. "auto": the default group if there is one.
            None: this process is alone, no collectives ever.
        project: name patterns as in ``split_parameters``, for groups that do not say ``"projected"``.
        skip: the same for what is not projected.
        no_decay: name patterns without weight decay.
        whole_model: on pipeline stages the parameter groups of the whole model, as ``split_parameters`` gives them (on
            the meta device will do): "blockwise" and "staggered" count over all its layers.
        seed: of the random selections.
        **unknown: arguments of other optimizers: refused, each with what it is called here.

    A hyperparameter that is "auto" has its default: JSON configs say so. ``FrugalConfig`` has the sources.

    Raises:
        ValueError: naming the parameter or key, for unknown or bad hyperparameters, unnamed parameters without
            ``"projected"``, a pattern that matches nothing, nothing projected, and shapes that leave nothing
            state-full.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        projection: str = "svd",
        side: str = "std",
        block_order: str = "random",
        state_full: str = "adamw",
        state_free: str = "sign",
        combine: str = "add",
        growth_limit: float = 0.0,
        momentum: float = 0.9,
        moments: str = "full",
        projected_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        on_refresh: str = "reset",
        svd_method: str = "exact",
        basis_dtype: str = "full",
        matmul: str = "fp32",
        rounding: str = "nearest",
        refresh_schedule: str = "together",
        compute_layout: str = "auto",
        residual_threshold: float = 0.0,
        shard_state: bool | str = "auto",
        process_group: Any = "auto",
        project: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        no_decay: Sequence[str] | None = None,
        whole_model: Iterable[Any] | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        own(self)
        engines.refuse_to_be_given_a_part()
        given = {key: value for key, value in locals().items() if key in HYPERPARAMETERS}
        known = [*HYPERPARAMETERS, "shard_state", "project", "skip", "no_decay"]
        known += [] if engines.reads_json() else ["process_group", "whole_model"]
        unknown = without_foreign(unknown, known, weight_decay=weight_decay)
        old = {key: value for key in OLD_NAMES if (value := unknown.get(key, "auto")) != "auto"}
        if old and projected_lr_scale not in (1.0, "auto"):
            old["projected_lr_scale"] = projected_lr_scale
        given = without_auto({**given, **renamed(old)})
        if not isinstance(shard_state, bool) and shard_state != "auto":
            raise ValueError(f"shard_state={shard_state!r} is not known. Use one of auto, true, false.")
        self._shard_state = shard_state
        self._process_group = process_group
        self._no_decay = _patterns(no_decay)
        self._originals: list[ParamSpec] = []
        self._whole: list[ParamSpec] = []
        self._sources: list[Callable[[], Tensor | None]] = []  # weak: engines replace parameters, ZeRO asks for them
        self._groups: list[dict[str, Any]] = []  # all groups, also while DeepSpeed shows one of them only
        self._runtime: Runtime | None = None
        self._before: Runtime | None = None  # a group was added to it
        self._started = False  # any gradient was not zero, or any state has moved
        self._checked: set[int] = set()  # parameters whose gradients all ranks have looked at together
        self._release: Release | None = None  # what steps inside of backward
        self._settled: dict[int, Seen] = {}  # what the state of each group was made with
        self._loaded: saved_state.Loaded | None = None
        self._saved_elsewhere = False
        self._saving_checked = self._told = self._parts_told = self._summarised = False
        resolved = FrugalConfig(**given)
        groups = as_groups(params)
        self._choice = Choice(_patterns(project), _patterns(skip), tables_in(groups))
        # Schedulers that cycle momentum look here for what to cycle: betas[0], or without betas "momentum".
        cycles = STATE_FULL[resolved.state_full].cycles
        shown = {key: value for key, value in given.items() if key != "betas" or cycles == "betas"}
        super().__init__(arranged(groups, self._choice), shown)
        self._whole = [] if whole_model is None else self._listed(whole_model)
        names = [original.name for original in [*self._originals, *self._whole]]
        for key, patterns in (
            ("project", self._choice.project),
            ("skip", self._choice.skip),
            ("no_decay", self._no_decay),
        ):
            check_patterns(names, patterns, key)
        advice = [selection_advice(self.parameter_report_rows()), engines.unheard_wishes(dataclasses.asdict(resolved))]
        self._check_shapes()
        engines.announce(self, process_group)
        for text in advice if speaks() else ():
            if text:
                notice(text)

    @property
    def defaults(self) -> dict[str, Any]:
        """Torch's attribute. Whoever replaces an optimizer reads it first: that is when ValueError can be raised."""
        engines.refuse_replacement()
        given = innermost(self).__dict__
        if "defaults" not in given:  # being built, or in a wrapper, which then answers with those of what it wraps
            raise AttributeError("defaults")
        defaults: dict[str, Any] = given["defaults"]
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        innermost(self).__dict__["defaults"] = value

    @property
    def saved_elsewhere(self) -> bool:
        """Whether all ranks' state is saved by other means where a launcher keeps rank 0's ``state_dict`` only."""
        return innermost(self)._saved_elsewhere

    @saved_elsewhere.setter
    def saved_elsewhere(self, value: bool) -> None:
        innermost(self)._saved_elsewhere = value

    # --- parameters -------------------------------------------------------------------------------------------------

    @on_innermost
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all ranks alike; its parameters are stepped from the next step on.

        Args:
            param_group: "params", tensors or (name, tensor) tuples, and whatever a group of the constructor may have:
                "projected", "param_names", hyperparameters; those that it leaves out are the constructor's.

        Raises:
            ValueError: as the constructor, naming the parameter or key; the group is not added then.
        """
        group = dict(param_group)
        check_group_keys(group)
        named = members_of(group)
        group["params"] = [tensor for _, tensor in named]
        engines.refuse_fsdp1(group["params"])
        index, known = len(self.param_groups), engines.names_of(group["params"])
        originals = [
            self._original(name or known[position], tensor, group.get("projected"), index, position)
            for position, (name, tensor) in enumerate(named)
        ]
        check_unique([*self._originals, *originals])
        group["param_names"] = [original.name for original in originals]  # for who builds another optimizer of them
        super().add_param_group(group)
        added = self.param_groups[index]
        try:
            betas = config_from(added).betas
        except ValueError:
            self.param_groups.pop()
            raise
        if added.get("betas") is None:
            added["betas"] = betas
        self._groups.append(added)
        self._originals = [*self._originals, *originals]  # the runtime before keeps its own list
        self._sources += [weakref.ref(tensor) for _, tensor in named]
        if self._release is not None:  # step() steps them
            self._release.params += group["params"]
            self._release.names += group["param_names"]
        if self._runtime is not None:  # the table of all ranks is built anew at the next step
            self._before, self._runtime = self._runtime, None

    def _original(
        self, name: str | None, tensor: Tensor, projected: bool | None, group: int, position: int
    ) -> ParamSpec:
        shape = engines.full_shape(tensor)
        named = name is not None
        name = None if name is None else clean_name(name)  # the same seeds and state names with and without wrappers
        if name is None:
            name = f"group{group}.{position}"
            if projected is None:
                raise ValueError(
                    f"Parameter {position} of group {group} (shape {shape}) has no name, so Frugal cannot tell whether "
                    "to project it. Pass model.named_parameters() or split_parameters(model), or put the names as "
                    '"param_names", or "projected": True or False, into its group.'
                )
        decided = bool(projected) if projected is not None else self._choice(name, shape)
        if decided and len(shape) not in (2, 3):
            raise ValueError(
                f"{name} has shape {shape}: only matrices (2-D) and stacks of them (3-D) can be projected. "
                'Put it into a group with "projected": False, or name it in skip.'
            )
        if projected is not None and self._choice.asked and named and self._choice(name, shape) is not decided:
            raise ValueError(
                f'{name}: its group says "projected": {decided}, but project and skip of Frugal say otherwise. '
                "Leave out one of the two; split_parameters takes the same patterns."
            )
        return ParamSpec(name, shape, decided, not matches(name, self._no_decay), group, position)

    def _listed(self, groups: Iterable[Any]) -> list[ParamSpec]:
        """Parameters that are only named here, as if they were given."""
        return [
            self._original(name, tensor, group.get("projected"), index, position)
            for index, group in enumerate(arranged(as_groups(groups), self._choice))
            for position, (name, tensor) in enumerate(members_of(group))
        ]

    def _check_shapes(self) -> None:
        for index, group in enumerate(self.param_groups):
            mine = [original for original in self._originals if original.group == index]
            check_sizes(config_from(group), self._of_the_whole(mine))

    def _of_the_whole(self, mine: list[ParamSpec]) -> list[ParamSpec]:
        """A group with the members that other pipeline stages have."""
        names = {original.name for original in mine}
        groups = {original.group for original in self._whole if original.name in names}
        return [original for original in self._whole if original.group in groups] or mine

    def _take_shapes(self) -> None:
        """Parameters may have been resized in place since the optimizer was built, as embeddings for new tokens are."""
        for i, (original, source) in enumerate(zip(self._originals, self._sources, strict=True)):
            tensor = source()
            shape = original.shape if tensor is None else engines.full_shape(tensor)
            if shape != original.shape:
                self._originals[i] = dataclasses.replace(original, shape=shape)
                self._check_shapes()

    @property
    def originals(self) -> list[ParamSpec]:
        """The parameters as the user's model has them, in order."""
        return list(innermost(self)._originals)

    def parameter_report_rows(self) -> list[ParameterInfo]:
        """How every parameter is treated, in order."""
        me = innermost(self)
        sources = [source() for source in me._sources]
        frozen = [source is not None and not source.requires_grad for source in sources]
        sizes = {} if me._runtime is None else bytes_by_name(me._runtime, me.state)
        some = any(group["weight_decay"] for group in me._groups)  # without any, the patterns are what there is to show
        decays = [group["weight_decay"] != 0.0 or not some for group in me._groups]
        return [
            ParameterInfo(o.name, o.shape, o.projected, o.decay and decays[o.group], still, sizes.get(o.name))
            for o, still in zip(me._originals, frozen, strict=True)
        ]

    def parameter_report(self) -> str:
        """A readable table of every parameter and its treatment."""
        return report(self.parameter_report_rows())

    def state_bytes(self) -> StateBytes:
        """Bytes of state on this rank, and AdamW's. Nothing (0 of 0) before the first step. No collective."""
        me = innermost(self)
        runtime = me._runtime
        return StateBytes(0, 0) if runtime is None else state_bytes(runtime, me.state)

    def summary(self) -> str:
        """One line: projected, regular and frozen parameters, and the state on this rank against AdamW's.

        After the first step the logger "frugal_dist" gets it on rank 0; under DeepSpeed, Accelerate and the Trainer it
        goes to stderr if that logger has no level.
        """
        me = innermost(self)
        line = summary(me.parameter_report_rows(), me._originals, me._groups, me.state_bytes())
        released = me._release is not None and bool(me._release.handles)
        return f"{line} Gradients are released in backward." if released else line

    def _summarise(self, runtime: Runtime) -> None:
        """Once, when every parameter has had its first step."""
        if self._summarised or len(self._checked) < len(runtime.originals):
            return
        self._summarised = True
        if runtime.ranks.rank == 0:
            tell(self.summary(), aloud=engines.is_driven(self))

    # --- a step -----------------------------------------------------------------------------------------------------

    def release_through(self, model: nn.Module) -> Release:
        """From now on backward passes step, as ``frugal_dist.step_in_backward`` says, which is to be called instead."""
        me, trained, params = weakref.ref(self), weakref.ref(model), self._members()

        def update(about: Sequence[int] | None) -> bool:
            optimizer = me()
            return optimizer is None or optimizer._update(about)

        def check() -> None:
            optimizer, module = me(), trained()
            if optimizer is not None and module is not None:
                refuse_release(module, optimizer, params, optimizer._process_group)

        check()
        if self._release is not None:
            self._release.remove()
        names, alone = [original.name for original in self._originals], ranks_of(self._process_group).alone
        self._release = Release(params, names, units_of(model, params), alone, update, check)
        return self._release

    def _members(self) -> list[Tensor]:
        """The parameters in order, as the groups have them now."""
        return [self._groups[original.group]["params"][original.position] for original in self._originals]

    def _close(self, release: Release) -> None:
        """What backward has left of a step."""
        if any(now is not then for now, then in zip(self._members(), release.params, strict=True)):
            raise ValueError(REPLACED)
        release.close()

    @_disable_dynamo  # a compiled training step calls it as it is
    @torch.no_grad()
    @on_innermost
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Collective: every rank calls it equally often, with or without gradients.

        Args:
            closure: computes the loss and gradients again, with gradients enabled; called once, before the update.

        Returns:
            What ``closure`` returned, None without one.

        Raises:
            ValueError: on all ranks alike, if the ranks disagree about the model, the engine is not supported or its
                checkpoints would be incomplete.
            RuntimeError: if a projector refresh keeps failing, or in a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is None:
            self._update()
        else:
            self._close(self._release)
        return loss

    def _update(self, about: Sequence[int] | None = None) -> bool:
        """Step all parameters, or those at some positions. Collective. False if it was the call ``_starts`` means."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(CAPTURED)
        follow_replaced(self._groups, self.param_groups)
        follow_cycles(self._groups, self.__dict__["defaults"])
        with full_precision():
            runtime = self._bind()
            runtime.storage.complete_gradients(runtime.ranks)
            replaces = not self._checked.issuperset(() if about is None else about)
            inputs = self._inputs(runtime, about)
            try:
                if self._starts(runtime, inputs):
                    return False
                if self._check_saving():  # it let go of this call's tensors
                    inputs = self._inputs(runtime, about)
                decision = decide(runtime, inputs.mats, inputs.regular)
                if decision.coordinates or decision.bases:
                    replaces = True
                    refresh(runtime, decision)
                step_matrices(runtime, inputs.mats, stepping(runtime, inputs.mats, decision))
                step_regular(runtime, inputs)
                self._summarise(runtime)
            finally:
                inputs.release()
                if replaces and self._release is not None:
                    self._release.catch_up()
        return True

    def _inputs(self, runtime: Runtime, about: Sequence[int] | None) -> StepInputs:
        """This call's tensors. ValueError for gradients that cannot be used; at the first call on all ranks alike, also
        on those without a gradient.
        """
        call = tuple(runtime.storage.call() if about is None else about)
        if self._checked.issuperset(call):
            return step_inputs(runtime, self.state, call)
        return together(runtime.ranks, lambda: step_inputs(runtime, self.state, call))

    def _starts(self, runtime: Runtime, inputs: StepInputs) -> bool:
        """Whether this is the all-zero call by which engines create the state: it leaves weights and counters alone.

        Only before anything has moved. ZeRO calls once for each group or sub-group, of which some may have zeros first.
        """
        ensure_state(runtime, inputs)
        if not self._started:
            moving = inputs.has_run() or inputs.has_gradient() or runtime.storage.moves_elsewhere()
            self._started = bool(agree_max(runtime.ranks, [int(moving)], inputs.device)[0])
        if self._started:
            self._checked.update(inputs.key)
        elif inputs.lacks_gradients() and not self._told:
            self._told = True
            notice(NO_GRADIENTS)
        return not self._started

    def _forget_start(self) -> None:
        self._started = False
        self._checked.clear()

    @on_innermost
    def take_refresh_figures(self) -> list[float]:
        """This rank's sums over the refreshes since the last call; add them over the ranks, then ``RefreshReport.of``.

        Zeros where nothing was refreshed. No collective.
        """
        return RefreshStats().take() if self._runtime is None else self._runtime.refresh_stats.take()

    def _bind(self) -> Runtime:
        """Find out, once, how the engine stores the parameters. Collective on more than one rank."""
        problem = ""
        try:
            settle(self._groups, self._originals, self._settled)
            if self._runtime is None and self._before is None:
                self._take_shapes()
        except ValueError as error:
            if self._runtime is not None:  # an ordinary step exchanges nothing by which others could hear of it
                raise
            problem = str(error)
        if self._runtime is None:
            self._forget_start()
            runtime = engines.bind(
                engines.Request(
                    optimizer=self,
                    originals=self._originals,
                    sources=[source() for source in self._sources],
                    groups=self._groups,
                    active=lambda: [tensor for group in self.param_groups for tensor in group["params"]],
                    process_group=self._process_group,
                    shard_state=self._shard_state,
                    bucket_bytes=BUCKET_BYTES,
                    whole=self._whole,
                    before=self._before,
                    problem=problem,
                )
            )
            saved_state.unpack_all(runtime, self.state, self._loaded)
            self._runtime, self._before, self._loaded = runtime, None, None
        return self._runtime

    @property
    def shard_state(self) -> bool | str:
        """Whether replicas share the low-rank state, as it was asked for; "auto": as the engine's default is."""
        return innermost(self)._shard_state

    # --- saving -----------------------------------------------------------------------------------------------------

    def _refuse_half(self) -> None:
        """Some weights have moved by this step and others have not: the program is there, on all ranks alike."""
        if self._release is not None and self._release.half_done:
            raise ValueError(HALF)

    @on_innermost
    def state_dict(self) -> dict[str, Any]:
        """Torch's form. Keys of tensors of which this rank holds a part end in "@rank1of4": save one file per rank, use
        torch.distributed.checkpoint, or ``frugal_dist.checkpoint``.

        Raises:
            ValueError: where the engine would keep one rank's part of shared state and lose the others', or half of a
                step is taken.
        """
        self._refuse_half()
        follow_replaced(self._groups, self.param_groups)
        handle = self.register_state_dict_post_hook(self._packed, prepend=True)  # other hooks see what is saved
        try:
            with as_made(self._groups, self._settled):
                return super().state_dict()
        finally:
            handle.remove()

    def _packed(self, _: Optimizer, plain: dict[str, Any]) -> dict[str, Any]:
        """Torch's form with the state as it is saved."""
        nameless = dcp_does_without_names()
        for group, names in zip(plain["param_groups"], self._names(), strict=True):
            group.pop(NAMES, None)
            group.update({NAMES: names} if names and not nameless else {})
        runtime = self._runtime or self._before
        if runtime is None:  # nothing yet, or as it was loaded
            return plain
        alone = runtime.shard_replicas and not runtime.storage.shares_replicas
        if alone and not self.saved_elsewhere:
            raise ValueError(
                "DeepSpeed stage 0 saves the optimizer state of rank 0 only, but with shard_state=True every rank "
                'holds a part. Save with frugal_dist.checkpoint, or remove "shard_state".'
            )
        packed = saved_state.pack_all(runtime, self.state)
        if not self.saved_elsewhere:
            saved_state.refuse_to_lose(packed)
            if not self._parts_told and saved_state.is_one_of_many(runtime, packed):
                self._parts_told = True
                notice(saved_state.PARTS)
        order = [tensor for group in self.param_groups for tensor in group["params"]]
        state = {number: packed[id(tensor)] for number, tensor in enumerate(order) if id(tensor) in packed}
        return {**plain, "state": state}

    def _names(self) -> list[list[str] | None]:
        """By group the names of the tensors in it, None where an engine has put others in their place."""
        numbers = {id(group): number for number, group in enumerate(self._groups)}
        given: dict[int | None, list[str]] = {}
        for original in self._originals:
            given.setdefault(original.group, []).append(original.name)
        names = [given.get(numbers.get(id(group)), []) for group in self.param_groups]
        return [
            own if len(own) == len(group["params"]) else None
            for own, group in zip(names, self.param_groups, strict=True)
        ]

    @torch.no_grad()
    @on_innermost
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken, on the same engine and number of ranks.

        Parameters are matched by name. Hyperparameters are those of ``state_dict``, as with torch's optimizers; rank 0
        says which differ from this program's, learning rates apart. Moments take the precision this run computes in.

        Args:
            state_dict: what ``state_dict()`` gave on this rank. Its tensors may lie on any device, and are copied.

        Raises:
            ValueError: for what does not fit: here, with nothing changed, on a process without a process group, on all
                ranks alike at the next step otherwise.
        """
        self._refuse_half()
        follow_replaced(self._groups, self.param_groups)
        kept = {key: self.__dict__[key] for key in LOADED}
        settled = engines.is_settled(self._process_group)  # engines load their masters, or wrap the model, after this
        try:
            refused = self._take(state_dict)
            if refused and not settled:  # a rank that raised alone would leave the others waiting
                self._runtime, self._before, self._loaded = None, None, saved_state.Loaded(refused=str(refused))
            elif refused:
                raise refused
            elif settled:
                with full_precision():
                    self._bind()
        except ValueError:
            self.__dict__.update(kept)
            raise

    def _take(self, state_dict: dict[str, Any]) -> ValueError | None:
        """Groups and state as they were saved; the next binding makes them live. Or why they cannot be."""
        before = list(self.param_groups)
        given: list[tuple[Saved, dict[int, Any]]] = []
        refused: list[ValueError] = []

        def take(_: Optimizer, changed: dict[str, Any]) -> dict[str, Any]:
            try:
                saved_state.check_entries(changed)
                saved = read_groups(changed["param_groups"], before, self._names())
            except ValueError as error:
                refused.append(error)
                raise
            given.append((saved, changed["state"]))
            return {**changed, "state": {}, "param_groups": saved.groups}  # torch would cast it to parameters' dtypes

        hooks = [
            self.register_load_state_dict_pre_hook(take),  # the last one: what others changed counts
            self.register_load_state_dict_post_hook(
                lambda _: self._restore(before, given[0][0], given[0][1]), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            if error not in refused:
                raise
        finally:
            for hook in hooks:
                hook.remove()
        return refused[0] if refused else None

    def _restore(self, before: list[dict[str, Any]], saved: Saved, state: dict[int, Any]) -> None:
        """Put the state in its place; torch has done so with the groups, which were those of ``before``."""
        loaded = {id(old): new for old, new in zip(before, self.param_groups, strict=True)}
        self._groups = [loaded.get(id(group), group) for group in self._groups]  # DeepSpeed removes empty groups
        self._settled = {}
        settle(self._groups, self._originals, self._settled)
        order = [tensor for group in self.param_groups for tensor in group["params"]]
        self.state = defaultdict(dict)
        for number, tensor in zip(saved.numbers, order, strict=True):
            if number in state:
                self.state[tensor] = saved_state.placed(state[number], tensor.device)
        self._runtime, self._before = None, None
        self._loaded = saved_state.Loaded(moved=saved.moved, replaced=saved.replaced)

    @on_innermost
    def is_divided(self) -> bool:
        """Whether ranks hold different parts of the state, so that no rank's state_dict is all of it. Collective."""
        return saved_state.is_divided(*self._everything())

    @on_innermost
    def is_stage(self) -> bool:
        """Whether others hold more of the model, as pipeline stages do: by ``whole_model``, and without it wherever the
        parameters lie on a part of a larger mesh. Collective at first.
        """
        if self._whole:
            return not {original.name for original in self._whole} <= {original.name for original in self._originals}
        return engines.is_slice(self, self._bind().ranks)

    def _check_saving(self) -> bool:
        """Once, and on all ranks alike: later only one may be asked for its state. Returns whether it looked."""
        if self._saving_checked or self.saved_elsewhere:
            return False
        looks = engines.keeps_rank_zero_only(self)
        if looks and self.is_divided():
            raise ValueError(saved_state.ONLY_RANK_ZERO)
        self._saving_checked = True
        return looks

    @torch.no_grad()
    @on_innermost
    def everything(self) -> tuple[Runtime, StepInputs]:
        """All matrices and regular parameters with their state, for ``frugal_dist.checkpoint``. Collective at first."""
        self._refuse_half()
        return self._everything()

    def _everything(self) -> tuple[Runtime, StepInputs]:
        with full_precision():
            follow_replaced(self._groups, self.param_groups)
            runtime = self._bind()
            inputs = step_inputs(runtime, self.state)
            ensure_state(runtime, inputs)
            return runtime, inputs

    @on_innermost
    def loaded(self) -> None:
        """Counts were set from outside: agree on them anew at the next step."""
        self._forget_start()
        if self._runtime is not None:
            self._runtime.agreed.clear()
            self._runtime.cuts.clear()
            self._runtime.failures.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but what is found out again at the next step."""
        if innermost(self) is not self:  # a wrapper is copied as what it is
            return dict(self.__dict__)
        return copying.contents(self, super().__getstate__())

    def __copy__(self) -> Frugal:
        return copying.shallow(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frugal:
        return copying.deep(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return copying.without_ranks(reduced)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" not in state:  # a wrapper
            self.__dict__.update(state)
            return
        own(self)
        super().__setstate__(state)
        copying.wake(self, copied="_originals" in state)
