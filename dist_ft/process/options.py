"""Options of the commands on runs, and how their `KEY=VALUE` words are read before torch is imported."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from ..config.strict import Count, Strict, Text
from ..errors import Problem, RequestError

Options = TypeVar("Options", bound=Strict)


class LmEvalOptions(Strict):
    """Options of `dist-ft eval` for lm-eval."""

    lm_eval: str | None = Field(None, description="lm-eval tasks for the base and tuned model: TASK[,TASK]")
    lm_eval_path: str | None = Field(None, description="folder with your own task files")
    lm_eval_limit: Count | None = Field(None, description="maximum number of rows per task")
    lm_eval_num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="few-shot examples per question")
    lm_eval_chat: bool | None = Field(None, description="use the chat template; defaults to whether the run used it")


class EvaluateOptions(LmEvalOptions):
    """Options of `dist-ft eval`."""

    split: Literal["validation", "test"] = Field("validation", description="split to evaluate on")
    baseline: bool = Field(False, description="true also evaluates the base model")
    model: Literal["export", "base"] = Field("export", description="export of the run, or its base model")
    general: str | None = Field(None, description="general text (file, folder, glob or Hub id) to measure forgetting")


class RowsOptions(Strict):
    """Options of `dist-ft data`."""

    rows: Count = Field(3, description="number of rows")
    split: Literal["train", "validation", "test"] = Field("train", description="split to show")
    width: Count | None = Field(None, description="characters in a line; defaults to the width of the terminal")


class InitOptions(Strict):
    """Options of `dist-ft init`."""

    model: Text = Field("smollm2", description="choice of model, folder, or OWNER/NAME of the Hugging Face Hub")
    data: Text = Field("support_desk", description="training rows: a file, folder, OWNER/NAME, or choice of data")
    task: Text = Field("instruction", description="what is learned; `dist-ft list task` shows the choices")
    method: Text = Field("lora", description="which weights are trained; `dist-ft list method` shows the choices")
    gpus: Count | Literal["auto"] = Field("auto", description="number of GPUs, or auto for all")
    out: Annotated[str, Field(pattern=r"^.+\.ya?ml$")] = Field("first.yaml", description="file to write")


class PlanOptions(Strict):
    """Options of `dist-ft plan`."""

    show: Literal["plan", "config"] = Field("plan", description="config prints the whole configuration as a YAML file")


class SweepOptions(Strict):
    """Options of `dist-ft sweep`."""

    trials: Count = Field(20, description="number of runs; sampler=grid runs every combination instead")
    metric: str = Field("loss", description="score of the last evaluation by which runs are compared")
    sampler: Literal["tpe", "random", "grid", "cmaes"] = Field("tpe", description="how the values are chosen")
    pruner: Literal["median", "none"] = Field(
        "median", description="median stops a run whose score is worse than the median at the same step"
    )
    jobs: Count = Field(1, description="runs at the same time, each with an equal share of the GPUs")


class GenerateOptions(Strict):
    """Options of `dist-ft generate`."""

    prompt: str | None = Field(
        None, description="text, or a JSON object with the fields of the task; if not set, a chat starts"
    )
    prompts: str | None = Field(None, description="file with one prompt per line, or SPLIT:N for rows of the data")
    model: Literal["export", "base", "both"] = Field("export", description="models that answer")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="maximum number of tokens of an answer")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="sampling temperature; 0 decodes greedily")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="sample from the most likely tokens of this probability only; needs a temperature"
    )
    system: str | None = Field(None, min_length=1, description="system message that begins the conversation")
    chat: bool | None = Field(None, description="use the chat template; defaults to whether the run used it")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(0, description="seed of sampling")


class ExportOptions(Strict):
    """Options of `dist-ft export`."""

    merge: bool = Field(False, description="true merges the adapter into the base model and writes a full model")
    checkpoint: str | None = Field(None, description="step-N, latest or best; defaults to the export of the run")
    out: str | None = Field(None, description="output folder; it must not exist yet")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="dtype of a merged or full model")


class ReportOptions(Strict):
    """Options of `dist-ft report`, besides the runs."""

    out: str | None = Field(None, description="file to write; defaults to report.html in the folder of a single run")


class StatusOptions(Strict):
    """Options of `dist-ft status`."""

    run: str | None = Field(None, description="folder of a run; by default, all runs are listed")
    runs: str = Field("runs", description="folder in which runs are listed")


class LogsOptions(Strict):
    """Options of `dist-ft logs`."""

    run: str = Field(description="folder of a run")
    follow: bool = Field(False, description="true goes on until the run has ended")
    lines: Count = Field(40, description="number of last lines to show first")
    rank: Annotated[int, Field(ge=0)] | None = Field(None, description="show the output of this rank")


class CancelOptions(Strict):
    """Options of `dist-ft cancel`."""

    run: str = Field(description="folder of a run")
    now: bool = Field(False, description="true ends the run at once, without a checkpoint")


def split_words(kind: type[Strict], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those that set an option of a command, and the others."""
    own = [word for word in words if word.partition("=")[0] in kind.model_fields]
    return own, [word for word in words if word not in own]


def read_words(kind: type[Options], words: Sequence[str]) -> Options:
    """Parse the options of a command.

    Raises:
        RequestError: With all malformed words, unknown keys (and the closest known one) and invalid values at once.
    """
    values: dict[str, object] = {}
    problems = []
    fields = kind.model_fields
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            way_out = f"did you mean {near[0]}=…?" if near else f"known keys: {', '.join(fields)}"
            problems.append(Problem(word, "is not an option of this command", way_out))
        elif key in values:
            problems.append(Problem(word, f"{key} is set more than once", "set it once"))
        else:
            values[key] = text if fields[key].annotation in (str, str | None) else _scalar(text)
    if problems:
        raise RequestError(*problems)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()
        raise RequestError(
            *(Problem(".".join(map(str, e["loc"][:1])), f"{e['msg']} (got {e['input']!r})", _help(kind)) for e in wrong)
        ) from None


def _scalar(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _help(kind: type[Strict]) -> str:
    return "; ".join(f"{name}: {field.description}" for name, field in kind.model_fields.items() if field.description)
