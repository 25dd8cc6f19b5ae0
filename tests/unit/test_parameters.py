"""Who is projected and who is regular: by module, by name, by pattern; and the report."""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from model_zoo import ZOO, build
from torch import nn

from frugal_dist import Frugal
from frugal_dist.notices import notice, tell
from frugal_dist.parameters.names import is_head
from frugal_dist.parameters.split import (
    ParameterInfo,
    check_patterns,
    clean_name,
    is_projected_name,
    matches,
    report,
    selection_advice,
    split_parameters,
)
from frugal_dist.parameters.summary import StateBytes

Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


class Block(nn.Module):
    """A gated MLP whose `gate` is no router, and an `output` and a `score` that are no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12, bias=False)
        self.output = nn.Linear(12, 8)
        self.score = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Toy(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(8, 20, bias=False)
        if tied:
            self.out.weight = self.tokens.weight


class Experts(nn.Module):
    """What transformers calls experts: 3-D parameters, one matrix per expert, and a 2-D bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 24, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 24))


def rows_of(groups: list[dict[str, Any]]) -> list[ParameterInfo]:
    return Frugal(groups, projection="columns", density=0.0, process_group=None).parameter_report_rows()


def treatment(model: nn.Module, **patterns: list[str]) -> dict[str, bool]:
    return {info.name: info.projected for info in rows_of(split_parameters(model, **patterns))}


def projected(model: nn.Module, **patterns: list[str]) -> list[str]:
    return [name for name, yes in treatment(model, **patterns).items() if yes]


# --- by module ----------------------------------------------------------------------------------------------


def test_linear_weights_are_projected_and_nothing_else() -> None:
    names = [f"layers.{i}.{local}.weight" for i in (0, 1) for local in ("gate", "output", "score")]
    assert projected(Toy()) == [*names, "out.weight"]


def test_a_head_tied_to_the_embedding_is_regular_and_listed_once() -> None:
    found = treatment(Toy(tied=True))
    assert found["tokens.weight"] is False
    assert "out.weight" not in found


def test_groups_hold_every_tensor_once_and_are_never_empty() -> None:
    model = Toy(tied=True)
    groups = split_parameters(model)
    assert [group["projected"] for group in groups] == [True, False]
    tensors = [tensor for group in groups for _, tensor in group["params"]]
    assert {id(t) for t in tensors} == {id(p) for p in model.parameters()}
    assert len(tensors) == len(list(model.parameters()))
    assert all(set(group) == {"params", "projected"} for group in groups)
    assert [group["projected"] for group in split_parameters(nn.Linear(4, 4, bias=False))] == [True]


def test_groups_work_as_torch_parameter_groups() -> None:
    torch.optim.AdamW(split_parameters(Toy(), no_decay=["*norm*", "*bias"]))


def test_frozen_parameters_are_included() -> None:
    model = Toy()
    model.layers[0].gate.weight.requires_grad_(False)
    assert "layers.0.gate.weight" in projected(model)


def test_subclasses_of_linear_and_packed_attention_weights_are_projected() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(MyLinear(4, 4), nn.TransformerEncoderLayer(8, 2, 16))
    assert projected(model) == [
        "0.weight",
        "1.self_attn.in_proj_weight",
        "1.self_attn.out_proj.weight",
        "1.linear1.weight",
        "1.linear2.weight",
    ]
    assert all(is_projected_name(info.name, info.shape) is info.projected for info in rows_of(split_parameters(model)))


def test_expert_stacks_are_projected_but_no_other_three_dimensional_parameter() -> None:
    model = nn.ModuleDict({"mlp": Experts(), "conv": nn.Conv1d(4, 4, 3), "linear": nn.Linear(4, 4)})
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 5, 4)))
    assert projected(model) == ["mlp.gate_up_proj", "linear.weight"]


def test_matrices_of_one_row_or_column_are_regular() -> None:
    model = nn.ModuleDict({"value": nn.Linear(8, 1), "spread": nn.Linear(1, 8), "matrix": nn.Linear(8, 8)})
    assert projected(model) == ["matrix.weight"]


def test_integer_weights_are_regular() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert projected(model) == ["1.weight"]


def test_the_shape_of_a_parameter_partitioned_by_zero3_is_its_full_one() -> None:
    model = nn.Linear(4, 6)
    model.weight.ds_shape = torch.Size((6, 4))  # what deepspeed.zero.Init leaves: an empty tensor that knows its shape
    model.weight.data = torch.empty(0)
    assert rows_of(split_parameters(model))[0] == ParameterInfo("weight", (6, 4), True, True)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="weight has no shape yet: run the model once"):
        split_parameters(nn.LazyLinear(4))


def test_nothing_to_project_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"No parameter is projected.*project="):
        split_parameters(nn.Embedding(5, 4))


# --- real models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_names_and_modules_agree_on_real_models(family: str) -> None:
    infos = rows_of(split_parameters(build(family)))
    differing = [info for info in infos if is_projected_name(info.name, info.shape) is not info.projected]
    assert not differing


@pytest.mark.parametrize("family", ZOO)
def test_only_embeddings_heads_and_routers_of_real_models_are_regular(family: str) -> None:
    infos = rows_of(split_parameters(build(family)))
    expected = [f"{path}.weight" for path in ZOO[family][3]]
    for info in infos:
        if len(info.shape) == 1:
            assert not info.projected
        else:
            assert info.projected is not matches(info.name, expected), info


def test_expert_stacks_of_mixtral_are_projected() -> None:
    assert "model.layers.0.mlp.experts.gate_up_proj" in projected(build("mixtral"))


def test_only_module_inspection_finds_a_head_of_unusual_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.words = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.words

    assert projected(nn.ModuleDict({"wrapped": Model()})) == ["wrapped.body.weight"]


def test_a_model_that_cannot_name_its_head_is_fine() -> None:
    class Model(nn.Linear):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert projected(Model(4, 4)) == ["weight"]


# --- by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (Q_PROJ, (8, 8), True),
        *(
            (f"{head}.weight", (90, 8), False)
            for head in ("projection", "to_logits", "output_layer", "out_head", "word_head")
        ),
        ("transformer.output_layer.weight", (90, 8), False),
        ("model.prediction_head.dense.weight", (8, 8), False),
        ("encoder.multi_head.q.weight", (8, 8), True),
        ("encoder.layers.0.projection.weight", (8, 8), True),
        ("wav2vec2.feature_projection.projection.weight", (8, 16), True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", (2, 8), False),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight", (8, 2), False),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", (8, 8), True),
        ("layers.0.attn.q_proj.lora_a.weight", (2, 8), False),
        ("lora_unet_mid.lora_down.weight", (2, 8), False),
        ("module." + Q_PROJ, (8, 8), True),
        ("_orig_mod.module.lm_head.weight", (90, 8), False),
        ("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.gate.weight", (4, 8), False),
        ("model.layers.0.mlp.gate.weight", (32, 8), True),  # a gated MLP
        ("encoder.layer.0.attention.output.dense.weight", (8, 8), True),
        ("layers.0.attention.output.weight", (8, 8), True),
        ("output.weight", (90, 8), False),
        ("classifier.3.weight", (2, 8), False),
        ("decoder.weight", (90, 8), False),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", (8, 8), True),
        ("albert.encoder.embedding_hidden_mapping_in.weight", (16, 8), True),
        ("layers.0.mlp.experts.0.w1.weight", (16, 8), True),
        ("layers.0.mlp.experts.gate_up_proj", (4, 16, 8), True),
        ("layers.0.mlp.experts.gate_up_proj_bias", (4, 16), False),
        ("conv.weight", (8, 8, 3), False),
        ("norm.weight", (8,), False),
        ("scale", (), False),
        ("latents", (8, 8), False),
        ("value.weight", (1, 8), False),
    ],
)
def test_names_alone(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_projected_name(name, shape) is expected


def test_clean_name_keeps_a_model_s_own_child_called_module() -> None:
    assert clean_name("module._orig_mod.module.layers.0._fsdp_wrapped_module.module.weight") == "layers.0.module.weight"
    assert clean_name("module") == "module"


def test_a_bare_parameter_is_no_head() -> None:
    assert not is_head("head")
    assert not is_head("output")


# --- heads by shape, adapters, frozen weights ---------------------------------------------------------------


class Vocabulary(nn.Module):
    """A head of a name of its own, an MLP of the width of four, and a byte table of that width."""

    def __init__(self, words: int = 100) -> None:
        super().__init__()
        self.embed, self.embed_positions = nn.Embedding(words, 8), nn.Embedding(32, 8)
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.layers = nn.ModuleList([nn.Linear(8, words, bias=False)])
        self.to_words = nn.Linear(8, words, bias=False)


@pytest.mark.parametrize("how", ["by module", "by name"])
def test_a_head_has_the_shape_of_the_largest_embedding(how: str) -> None:
    def found(model: nn.Module) -> list[str]:
        given: Any = split_parameters(model) if how == "by module" else model.named_parameters()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [row.name for row in Frugal(given).parameter_report_rows() if row.projected]

    assert found(Vocabulary()) == ["up.weight", "down.weight", "layers.0.weight"]
    assert found(Vocabulary(32)) == ["up.weight", "down.weight", "layers.0.weight", "to_words.weight"], "it is not told"


def adapted() -> nn.Module:
    """As peft does it: a frozen base, trained adapters."""
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("base_layer", "k_proj")}).requires_grad_(
        False
    )
    model["lora_A"] = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
    model["lora_B"] = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
    return nn.ModuleDict({"q_proj": model})


def test_adapters_are_regular_unless_asked_and_frozen_weights_do_not_count() -> None:
    model = adapted()
    with pytest.warns(UserWarning, match=r"None of the parameters are projected \(not counting 2 that are frozen\)"):
        optimizer = Frugal(split_parameters(model))
    lines = optimizer.parameter_report().splitlines()
    assert lines[0].split()[-2:] == ["decay", "frozen"]
    assert lines[-4:] == [
        "projected: 0 parameters, 0 elements (0.0%)",
        "regular: 2 parameters, 32 elements (20.0%)",
        "frozen: 2 parameters, 128 elements (80.0%)",
        "total: 4 parameters, 160 elements",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = Frugal(split_parameters(model, project=["*lora_?.*"]), density=0.5, side="right", projection="columns")
    assert [row.projected for row in asked.parameter_report_rows() if not row.frozen] == [True, True]


# --- patterns given to the optimizer ------------------------------------------------------------------------


def test_patterns_of_the_optimizer_are_those_of_split_parameters() -> None:
    patterns: dict[str, Any] = {"project": ["layers.*.weight", "tokens.weight"], "skip": ["*norm*", "*.score.weight"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_name = Frugal(Toy().named_parameters(), density=0.5, **patterns)
        by_module = Frugal(split_parameters(Toy(), **patterns), density=0.5)
        plain = Frugal(Toy().named_parameters(), project="auto", skip="auto")
    assert treatment_of(by_name) == treatment_of(by_module)
    assert treatment_of(plain) == treatment_of(Frugal(Toy().named_parameters()))
    assert treatment_of(pickle.loads(pickle.dumps(by_name))) == treatment_of(by_name)


def treatment_of(optimizer: Frugal) -> dict[str, bool]:
    return {row.name: row.projected for row in optimizer.parameter_report_rows()}


def test_patterns_that_cannot_hold_are_refused() -> None:
    for key in ("project", "skip"):
        with pytest.raises(ValueError, match=f'{key}: the pattern "nothing" matches no parameter'):
            Frugal(Toy().named_parameters(), **{key: ["nothing"]})
    with pytest.raises(ValueError, match=r"layers.0.output.bias has shape \(8,\).*skip"):
        Frugal(Toy().named_parameters(), project=["layers.*"])
    with pytest.raises(ValueError, match='its group says "projected": True, but project and skip'):
        Frugal(split_parameters(Toy()), skip=["layers.0.gate.weight"])


# --- what it saves ------------------------------------------------------------------------------------------


def test_the_first_step_tells_what_is_projected_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    weights = {"q_proj.weight": (16, 8), "experts.up": (3, 16, 8), "k_proj.weight": (8, 8), "norm.weight": (8,)}
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in weights.items()}
    params["k_proj.weight"].requires_grad_(False)
    optimizer = Frugal(params.items(), projection="columns", density=0.5)
    assert optimizer.state_bytes() == StateBytes(0, 0)
    with caplog.at_level("INFO", "frugal_dist"):
        for _ in range(2):
            for param in params.values():
                param.grad = torch.ones_like(param) if param.requires_grad else None
            optimizer.step()
    counters, moments = 8 * 5, 4 * 2
    sizes = {row.name: row.state_bytes for row in optimizer.parameter_report_rows()}
    assert sizes == {
        "q_proj.weight": moments * 64 + counters,
        "experts.up": moments * 192 + 3 * counters,
        "k_proj.weight": counters,
        "norm.weight": moments * 8 + 8,
    }
    held, adamw = sum(size or 0 for size in sizes.values()), moments * (128 + 384 + 8)
    assert optimizer.state_bytes() == StateBytes(held, adamw)
    assert [record.getMessage() for record in caplog.records] == [
        "Frugal (columns, density 0.5): 512 elements projected, 8 regular (adamw), 64 frozen. Optimizer state 0.00 MB "
        f"on this rank, AdamW's would be 0.00 MB ({held / adamw:.0%} of it)."
    ]


def test_so_does_the_first_step_of_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    runs = [Frugal([("q_proj.weight", nn.Parameter(torch.zeros(8, 8)))]) for _ in range(2)]

    def step(optimizer: Frugal) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step(runs[0])
    with caplog.at_level("INFO", "frugal_dist"):
        for optimizer in reversed(runs):  # the one that has said it stays silent
            optimizer.load_state_dict(runs[0].state_dict())
            step(optimizer)
            step(optimizer)
    assert len([record for record in caplog.records if "elements projected" in record.getMessage()]) == 1


def test_a_line_does_not_stick_to_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=2, file=sys.stderr) as bar:
        tell("a line", aloud=True)
        bar.update()
    lines = [line.rstrip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert "frugal_dist: a line" in lines


def test_in_a_loop_of_one_s_own_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = Frugal([("q_proj.weight", weight)])
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert capsys.readouterr() == ("", "")


# --- patterns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.weight", "q_proj.weight", "layers.3.*", "*q_proj*", Q_PROJ, "model.layers.?.*"])
def test_patterns_fit_names_and_dotted_suffixes(pattern: str) -> None:
    assert matches(Q_PROJ, [pattern])
    assert matches("module._orig_mod." + Q_PROJ, [pattern])


@pytest.mark.parametrize("pattern", ["q_proj", "proj.weight", "Q_PROJ.weight", "layers.3", "ayers.3.*"])
def test_patterns_do_not_fit_parts_of_words_modules_or_other_case(pattern: str) -> None:
    assert not matches(Q_PROJ, [pattern])


def test_no_patterns_fit_nothing() -> None:
    assert not matches(Q_PROJ, None)
    assert not matches(Q_PROJ, [])


def test_project_replaces_the_default_and_skip_removes() -> None:
    assert projected(Toy(), project=["tokens.weight", "*gate*"]) == [
        "tokens.weight",
        "layers.0.gate.weight",
        "layers.1.gate.weight",
    ]
    assert projected(Toy(), project=["*gate*"], skip=["layers.1.*"]) == ["layers.0.gate.weight"]
    assert projected(Toy(), project=["layers.0.*"], skip=["*bias", "*norm*"])[-1] == "layers.0.score.weight"


def test_no_decay_makes_groups_of_its_own() -> None:
    groups = split_parameters(Toy(), no_decay=["*bias", "*norm*", "tokens.weight", "layers.0.gate.weight"])
    assert [(group["projected"], group.get("weight_decay")) for group in groups] == [
        (True, None),
        (True, 0.0),
        (False, 0.0),
    ]
    without = {name for group in groups[1:] for name, _ in group["params"]}
    assert without >= {"tokens.weight", "layers.0.gate.weight"}


def test_a_tied_tensor_is_found_under_each_of_its_names() -> None:
    assert projected(Toy(tied=True), project=["out.weight"]) == ["tokens.weight"]


def test_project_of_a_vector_names_it() -> None:
    with pytest.raises(ValueError, match=r"project matches layers\.0\.norm\.weight of shape \(8,\)"):
        split_parameters(Toy(), project=["norm.weight"])


def test_the_report_shows_which_groups_do_not_decay() -> None:
    groups = split_parameters(Toy(), no_decay=["*bias", "*norm*"])
    torchs = [{"weight_decay": 0.1, **group} for group in groups]  # as people write them without a default
    named = {name for name, _ in Toy().named_parameters() if "norm" in name or name.endswith("bias")}
    assert named
    for optimizer in (Frugal(groups, weight_decay=0.1), Frugal(torchs)):
        assert {row.name for row in optimizer.parameter_report_rows() if not row.decay} == named


@pytest.mark.parametrize("key", ["project", "skip", "no_decay"])
def test_a_pattern_that_matches_nothing_is_an_error(key: str) -> None:
    with pytest.raises(
        ValueError, match=rf'{key}: the pattern "gaet.weight" matches no parameter.*layers\.0\.gate\.weight'
    ):
        split_parameters(Toy(), **{key: ["gaet.weight"]})


@pytest.mark.parametrize(("pattern", "better"), [("q_proj", "q_proj.*"), ("proj.weight", "*proj.weight*")])
def test_a_pattern_for_a_module_is_told_how_to_be_written(pattern: str, better: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'did you mean "{better}"?')):
        check_patterns([Q_PROJ], [pattern], "skip")


def test_a_pattern_far_from_everything_shows_what_names_look_like() -> None:
    with pytest.raises(ValueError, match="Names look like: " + re.escape(Q_PROJ)):
        check_patterns([Q_PROJ], ["12345"], "skip")


def test_a_single_text_instead_of_a_list_is_an_error() -> None:
    with pytest.raises(ValueError, match=r'no_decay must be a list.*write \["bias"\]'):
        check_patterns(["bias"], "bias", "no_decay")


def test_none_and_empty_patterns_are_fine() -> None:
    check_patterns(["bias"], None, "skip")
    check_patterns(["bias"], [], "skip")


# --- report and checks --------------------------------------------------------------------------------------

INFOS = [
    ParameterInfo("embed.weight", (100, 8), False, True),
    *[ParameterInfo(f"layers.{i}.up.weight", (16, 8), True, True) for i in (0, 1, 2, 4)],
    *[ParameterInfo(f"layers.{i}.norm.weight", (8,), False, False) for i in (0, 1, 2, 4)],
    *[ParameterInfo(f"experts.{i}.{j}.w1", (4, 4), True, True) for i in (0, 1) for j in (0, 1, 2)],
    *[ParameterInfo(f"odd.{i}.{j}.w1", (4, 4), True, True) for i, j in ((0, 0), (0, 1), (1, 1))],
    ParameterInfo("scale", (), False, True),
]


def test_the_report_says_everything_once() -> None:
    assert report(INFOS).splitlines() == [
        "parameter                    shape  number  elements  treatment  decay",
        "--------------------------  ------  ------  --------  ---------  -----",
        "embed.weight                 100×8       1       800  regular    yes",
        "layers.{0-2,4}.up.weight      16×8       4       512  projected  yes",
        "layers.{0-2,4}.norm.weight       8       4        32  regular    no",
        "experts.{0-1}.{0-2}.w1         4×4       6        96  projected  yes",
        "odd.0.0.w1                     4×4       1        16  projected  yes",
        "odd.0.1.w1                     4×4       1        16  projected  yes",
        "odd.1.1.w1                     4×4       1        16  projected  yes",
        "scale                       scalar       1         1  regular    yes",
        "",
        "projected: 13 parameters, 656 elements (44.1%)",
        "regular: 6 parameters, 833 elements (55.9%)",
        "total: 19 parameters, 1,489 elements",
    ]


def test_the_report_can_list_every_parameter() -> None:
    lines = report(INFOS, collapse=False).splitlines()
    assert len(lines) == 2 + len(INFOS) + 4
    assert any(line.startswith("layers.4.up.weight") for line in lines)


def test_the_report_of_nothing_is_a_table_without_lines() -> None:
    assert report([]).endswith("total: 0 parameters, 0 elements")


def test_fewer_than_half_projected_is_worth_advice() -> None:
    advice = selection_advice(INFOS)
    assert re.search(r"Only 44% of the parameters are projected.*embed\.weight with 800 elements", advice)


def test_half_projected_is_silent() -> None:
    half = [ParameterInfo("a", (2, 2), True, True), ParameterInfo("b", (4,), False, True)]
    assert selection_advice(half) == ""


def test_nothing_projected_is_an_error() -> None:
    with pytest.raises(ValueError, match="No parameter is projected"):
        selection_advice([ParameterInfo("a", (2, 2), False, True)])


def test_the_bytes_of_every_parameter_add_up_to_all() -> None:
    """Also those of a regular stack, whose state has no name before it, and of projected ones, whose state has."""
    shapes = {"stack": (3, 4, 5), "experts": (2, 8, 6), "w": (8, 8), "norm": (8,)}
    named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    groups = [
        {"params": [(name, named[name]) for name in ("experts", "w")], "projected": True},
        {"params": [(name, named[name]) for name in ("stack", "norm")], "projected": False},
    ]
    optimizer = Frugal(groups, process_group=None)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_name = {info.name: info.state_bytes for info in optimizer.parameter_report_rows()}
    assert all(by_name.values())
    assert sum(value for value in by_name.values() if value) == optimizer.state_bytes().held


def test_a_terminal_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank, while the others go on."""
    with open(os.devnull, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
    tell("a line", aloud=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice("a warning")


ONE = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (Block(), "not a single Block. Pass model.named_parameters()"),
        (nn.Sequential(nn.Linear(4, 4)), "has a member (Linear) that is not (name, parameter)"),
        (ONE, "not a single Parameter. Pass"),
        ({"params": [ONE]}, "not one group: put it into a list."),
        (dict(Block().named_parameters()), "not a dict: pass its items()."),
        (["weight"], "has a member (str) that"),
        ([("weight", 3)], "has a member (str, int) that"),
        ([("weight", ONE, 3)], "has a member (str, Parameter, int) that"),
        ([{"params": Block()}], "a list under the key 'params', not Block."),
        ([{"weights": [ONE]}], "a list under the key 'params', not NoneType."),
        ([{"params": [("weight", ONE)]}, ONE], "a list under the key 'params', not Parameter."),
        ([], "params is empty. Pass"),
    ],
)
def test_what_is_no_parameters_is_refused_by_what_it_is(params: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Frugal(params)
