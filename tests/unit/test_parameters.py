"""Who is projected and who is regular: by module, by name, by pattern; and the report."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from model_zoo import ZOO, build
from torch import nn

from frugal_dist.names import is_head
from frugal_dist.parameters import (
    ParameterInfo,
    check_patterns,
    check_selection,
    clean_name,
    describe,
    is_projected_name,
    matches,
    report,
    split_parameters,
)

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


def treatment(model: nn.Module, **patterns: list[str]) -> dict[str, bool]:
    return {info.name: info.projected for info in describe(split_parameters(model, **patterns))}


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
    assert all(is_projected_name(info.name, info.shape) is info.projected for info in describe(split_parameters(model)))


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
    assert describe(split_parameters(model))[0] == ParameterInfo("weight", (6, 4), True, True)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="weight has no shape yet: run the model once"):
        split_parameters(nn.LazyLinear(4))


def test_nothing_to_project_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"No parameter is projected.*project="):
        split_parameters(nn.Embedding(5, 4))


# --- real models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_names_and_modules_agree_on_real_models(family: str) -> None:
    infos = describe(split_parameters(build(family)))
    differing = [info for info in infos if is_projected_name(info.name, info.shape) is not info.projected]
    assert not differing


@pytest.mark.parametrize("family", ZOO)
def test_only_embeddings_heads_and_routers_of_real_models_are_regular(family: str) -> None:
    infos = describe(split_parameters(build(family)))
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
    assert {info.name for info in describe(groups) if not info.decay} >= {"tokens.weight", "layers.0.gate.weight"}


def test_a_tied_tensor_is_found_under_each_of_its_names() -> None:
    assert projected(Toy(tied=True), project=["out.weight"]) == ["tokens.weight"]


def test_project_of_a_vector_names_it() -> None:
    with pytest.raises(ValueError, match=r"project matches layers\.0\.norm\.weight of shape \(8,\)"):
        split_parameters(Toy(), project=["norm.weight"])


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


def test_fewer_than_half_projected_is_a_warning_with_advice() -> None:
    with pytest.warns(UserWarning, match=r"Only 44% of the parameters are projected.*embed\.weight with 800 elements"):
        check_selection(INFOS)


def test_half_projected_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_selection([ParameterInfo("a", (2, 2), True, True), ParameterInfo("b", (4,), False, True)])


def test_nothing_projected_is_an_error() -> None:
    with pytest.raises(ValueError, match="No parameter is projected"):
        check_selection([ParameterInfo("a", (2, 2), False, True)])
