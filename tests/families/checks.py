"""Everything that streamcomp must do with a tiny model of any type, or refuse with a reason.

Nothing here knows an architecture. What comes out is compared with transformers' whole model, and
with products of the stored factors that are computed without streamcomp.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import streamcomp
from streamcomp.calibration.corpus import load_windows
from streamcomp.errors import StreamcompError
from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.forms.runtime import FactoredLinear
from streamcomp.model.experts import ExpertBank
from streamcomp.model.streamer import BlockStreamer
from tests.families.apart import banks_of, run_apart
from tests.families.tiny import NotBuiltError, default_model, save_tiny
from tests.jobs import (
    RESOURCES,
    compress,
    config_of,
    expert_products,
    factored_modules,
    products,
    quick_plan,
    small_recipe,
    stored_tensors,
)
from tests.model.folders import CPU, open_skeleton, streamed_logits

__all__ = ["Family", "Step", "check_family", "streamed_gradient"]

OK, REFUSED, WRONG, TRACEBACK, NOT_BUILT = "ok", "refused", "WRONG", "traceback", "not built"
_WORST_FIRST = (NOT_BUILT, WRONG, TRACEBACK, REFUSED)

# The recipes that every type goes through, by their names in the report.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "svd-llm uv": {"method": "svd-llm", "form": "uv"},
}
RATIO = 0.2

_NLL = 2e-5  # largest relative difference of two negative log-likelihoods
_LOGITS = 2e-5  # largest difference of logits in fp32, in parts of the largest logit
_WEIGHTS = 1e-5  # the same of weights
_GRADIENTS = 1e-4  # the same of gradients, which sum up more roundings
_MOVED = 1e-4  # by which compressing changes some logit at least

# Tensors of each form, besides the right factor; the left factor first.
_LEAVES = {"uv": ("U",), "pivot": ("coef", "pivots")}

_SEQ_LEN, _WINDOWS = 16, 6
_ANSWER = 5  # tokens to generate
_DETAIL = 400  # characters of a message that are kept


@dataclass(frozen=True)
class Step:
    """One thing tried, and what came of it."""

    name: str
    outcome: str  # ok, refused, WRONG, traceback or not built
    detail: str = ""  # the message
    where: str = ""  # the line of code that an error came from
    trace: str = ""


@dataclass
class Family:
    """What streamcomp does with one type of model."""

    kind: str
    model_class: str = ""
    parameters: int = 0
    # Of the numbers in the blocks' matrices, the share that can be factored: of the tiny model, and
    # of one as large as the type's default config; and the shares of what cannot, in the larger.
    share: float | None = None
    default_share: float | None = None
    default_parameters: int = 0
    dense: dict[str, float] = field(default_factory=dict)
    # Largest difference of streamed logits from the whole model's, in parts of the largest; 0: the
    # same bits.
    difference: float | None = None
    # The same with experts run one by one; None where there are none to be run so.
    apart: float | None = None
    remarks: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        outcomes = {step.outcome for step in self.steps}
        return next((outcome for outcome in _WORST_FIRST if outcome in outcomes), "works")

    @property
    def reason(self) -> Step | None:
        """The first step of the outcome that decides the verdict."""
        return next((step for step in self.steps if step.outcome == self.verdict), None)

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}


class _WrongError(Exception):
    """A result that differs from what it must be."""


def check_family(
    kind: str,
    folder: Path,
    tell: Callable[[Family], None] = lambda family: None,
    recipes: Mapping[str, dict[str, Any]] = RECIPES,
) -> Family:
    """Build a tiny model of type ``kind`` below ``folder`` and do everything with it.

    ``tell`` is called after each step.
    """
    checks = _Checks(kind, folder, tell, recipes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks.run()
    return checks.family


class _Checks:
    """One type of model on its way through all steps."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        tell: Callable[[Family], None],
        recipes: Mapping[str, dict[str, Any]],
    ) -> None:
        self.family, self.folder, self.tell, self.recipes = Family(kind), folder, tell, recipes
        self.source = folder / "source"
        self.text = _write_text(folder / "text.txt", 3000)
        # Like the text, without the first letters of the vocabulary, which may stand for padding.
        self.tokens = torch.randint(16, 250, (2, 12), generator=torch.Generator().manual_seed(3))

    def run(self) -> None:
        if not self._step("build", self._build):
            return
        self._step("inspect", self._inspect)
        self._step("plan", self._plan)
        if self._step("evaluate", self._evaluate_original):
            self._step("differentiate", self._differentiate)
            self._step("experts one by one", self._run_apart)
        for name, settings in self.recipes.items():
            out = self.folder / name.replace(" ", "-")
            if not self._step(f"compress, {name}", self._compress, out, settings):
                continue
            if self._step(f"reload, {name}", self._reload, out):
                self._step(f"generate, {name}", self._generate, out)
                self._step(f"evaluate, {name}", self._evaluate, out)

    def _step(self, name: str, action: Callable[..., None], *arguments: Any) -> bool:
        """Run ``action`` and keep what came of it."""
        try:
            action(*arguments)
            step = Step(name, OK)
        except _WrongError as error:
            step = Step(name, WRONG, str(error))
        except NotBuiltError as error:
            step = Step(name, NOT_BUILT, str(error)[:_DETAIL])
        except StreamcompError as error:
            step = _failed(name, REFUSED, error, self.folder)
        except Exception as error:  # a fault of streamcomp, whatever it is
            step = _failed(name, TRACEBACK, error, self.folder)
        self.family.steps.append(step)
        self.tell(self.family)
        return step.outcome == OK

    # -- the original --------------------------------------------------------------------

    def _build(self) -> None:
        """The tiny model as transformers itself runs it, before and after it was saved."""
        model = save_tiny(self.family.kind, self.source)
        self.family.model_class = type(model).__name__
        self.family.parameters = sum(parameter.numel() for parameter in model.parameters())
        try:
            made = _logits(model, self.tokens)
            self.original = _logits(_load(self.source), self.tokens)
        except Exception as error:  # whatever the model's own code raises
            raise NotBuiltError(f"transformers cannot run it alone: {_message(error)}") from error
        if not made.isfinite().all():
            raise NotBuiltError("its logits are not finite")
        lost = _difference(self.original, made)
        if lost > _LOGITS:
            self.family.remarks.append(f"transformers reloads it with other logits ({lost:.0e})")

    def _inspect(self) -> None:
        """What inspect says, in shares of the numbers in the blocks' matrices."""
        inspection = streamcomp.inspect(self.source)
        skeleton = open_skeleton(self.source)
        family, layers = self.family, skeleton.layers_name
        left = {name: why for name, (why, _) in inspection.left.items()}
        family.share, family.dense = _shares(skeleton.model, layers, left)
        original = default_model(family.kind)
        if original is not None:
            family.default_parameters = sum(
                parameter.numel() for parameter in original.parameters()
            )
            family.default_share, family.dense = _shares(original, layers, left)

    def _plan(self) -> None:
        with quick_plan():
            streamcomp.plan(self.source, small_recipe(self.text), RESOURCES)

    def _evaluate_original(self) -> None:
        """Run block by block, the model has the logits and the likelihood of the whole one."""
        streamed = streamed_logits(self.source, self.tokens)
        self.family.difference = _difference(streamed, self.original)
        _must_agree("streamed and whole logits", streamed, self.original, _LOGITS)
        self._evaluate(self.source)

    def _differentiate(self) -> None:
        """The loss's gradient at the first block's input is autograd's on the whole model."""
        streamed, whole = streamed_gradient(self.source, self.tokens), self._whole_gradient()
        if packing := open_skeleton(self.source).packing:
            streamed = packing.hidden_in(streamed)
        _must_agree("streamed and whole gradients", streamed, whole, _GRADIENTS)

    def _run_apart(self) -> None:
        """Experts that run one by one, as in a job, make the same logits and gradient."""
        if not banks_of(open_skeleton(self.source)):
            return
        logits, gradient = run_apart(self.source, self.tokens, _loss, self.folder)
        self.family.apart = _difference(logits, self.original)
        _must_agree("logits with experts one by one and whole", logits, self.original)
        streamed = streamed_gradient(self.source, self.tokens)
        _must_agree("gradients with experts one by one", gradient, streamed, _GRADIENTS)

    def _whole_gradient(self) -> Tensor:
        model = _load(self.source).requires_grad_(False)
        layers = open_skeleton(self.source).layers_name
        entered: list[Tensor] = []

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            entered.append(hidden.detach().requires_grad_())
            if args:
                return (entered[0], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entered[0]}

        model.get_submodule(f"{layers}.0").register_forward_pre_hook(enter, with_kwargs=True)
        logits = model(input_ids=self.tokens, use_cache=False).logits
        return torch.autograd.grad(_loss(logits, self.tokens), entered[0])[0]

    # -- the compressed model ------------------------------------------------------------

    def _compress(self, out: Path, settings: dict[str, Any]) -> None:
        """All but factored weights must be the original's, byte by byte; no others are new."""
        compress(self.source, out, self.text, ratio=RATIO, **settings)
        banks = banks_of(open_skeleton(self.source)).values()
        gone, made = _replaced(factored_modules(out), {bank.disk_name: bank for bank in banks})
        before, after = stored_tensors(self.source), stored_tensors(out)
        if strange := after.keys() ^ (before.keys() - gone | made):
            raise _WrongError(f"{min(strange)} is missing, or should not be there")
        for name in before.keys() - gone:
            if not torch.equal(before[name], after[name]):
                raise _WrongError(f"{name} is not what it was")

    def _reload(self, out: Path) -> None:
        """transformers makes of the factors what it makes of their products."""
        model = _load(out)
        modules = factored_modules(out)
        ours = FactoredLinear, FactoredExperts
        count = sum(isinstance(module, ours) for module in model.modules())
        if count != len(modules):
            raise _WrongError(f"{count} factored modules are loaded, {len(modules)} were written")
        dense = out.with_name(f"{out.name}-dense")
        streamcomp.export(out, dense, form="dense")
        stored, plain = stored_tensors(dense), _load(dense)
        convs = {name for name, part in plain.named_modules() if isinstance(part, Conv1D)}
        for name, product in products(out).items():
            weight = stored[f"{name}.weight"].double()
            product = product.T if name in convs else product
            _must_agree(f"{name} of the export and its product", weight, product, _WEIGHTS)
        for name, weight, product in self._experts(out, plain):
            _must_agree(f"{name} of the export and its product", weight, product, _WEIGHTS)
        logits = _logits(model, self.tokens)
        _must_agree("logits of factors and products", logits, _logits(plain, self.tokens))
        if _difference(logits, self.original) < _MOVED:
            raise _WrongError("compressing changed no logit")
        if _settings(out) != _settings(self.source):
            raise _WrongError("config.json has other settings than the original")

    def _experts(self, out: Path, plain: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each matrix of each factored expert: its name, what ``plain`` holds, and the product."""
        modules, tensors = factored_modules(out), stored_tensors(out)
        for number, bank in banks_of(open_skeleton(self.source)).items():
            spec, tail = modules.get(bank.disk_name), f".{number}.{bank.name}"
            if spec is None:
                continue
            held: Any = next(part for name, part in plain.named_modules() if name.endswith(tail))
            for leaf, ranks in spec["ranks"].items():
                name = f"{bank.disk_name}.{leaf}"
                for expert, product in expert_products(tensors, name, spec, ranks):
                    weight = held.get_parameter(leaf)[expert].detach().double()
                    yield f"{name} {expert}", weight.T if held.is_transposed else weight, product

    def _generate(self, out: Path) -> None:
        """As many tokens as asked for; a type that cannot even uncompressed is no fault of ours."""
        try:
            length = _spoken(_load(out), self.tokens[:1])
        except Exception:
            try:
                _spoken(_load(self.source), self.tokens[:1])
            except Exception as error:
                remark = f"transformers cannot generate with it ({_message(error)})"
                if remark not in self.family.remarks:
                    self.family.remarks.append(remark)
                return
            raise
        if length != _ANSWER:
            raise _WrongError(f"{length} tokens generated instead of {_ANSWER}")

    def _evaluate(self, folder: Path) -> None:
        """The streamed perplexity is the whole model's."""
        evaluation = streamcomp.evaluate(
            folder, str(self.text), seq_len=_SEQ_LEN, windows=_WINDOWS, resources=RESOURCES
        )
        windows = load_windows(folder, [str(self.text)], _WINDOWS, _SEQ_LEN, None).tokens.long()
        whole = float(_loss(_logits(_load(folder), windows).double(), windows))
        if not abs(evaluation.nll - whole) <= _NLL * whole:
            raise _WrongError(f"streamed nll {evaluation.nll:.7f}, of the whole model {whole:.7f}")


# -- helpers -----------------------------------------------------------------------------


def _replaced(
    modules: Mapping[str, Mapping[str, Any]], banks: Mapping[str, ExpertBank]
) -> tuple[set[str], set[str]]:
    """Names on disk of the tensors that ``modules`` replace, and of those they consist of.

    As docs/format.md has them, for linears and for the experts ``banks``.
    """
    gone, made = set[str](), set[str]()
    for name, spec in modules.items():
        if "ranks" not in spec:
            gone.add(f"{name}.weight")
            made |= {f"{name}.{leaf}" for leaf in ("weight", *_LEAVES[spec["form"]])}
            continue
        bank = banks[name]
        gone |= bank.names_on_disk
        made.add(f"{name}.{bank.matrices[0][0]}")  # the guard
        for leaf, rows, _ in bank.matrices:
            left, *others = _LEAVES[spec["form"]]
            dense = all(rank == rows for rank in spec["ranks"][leaf])
            parts = ("V", *others) if dense else ("V", left, *others)
            made |= {f"{name}.{leaf}_{part}" for part in parts}
    return gone, made


def _write_text(path: Path, tokens: int) -> Path:
    """Random letters and digits, more kinds of them than a tiny model has channels."""
    random = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(torch.randint(48, 127, (tokens,), generator=random).tolist()))
    return path


def _load(folder: Path) -> PreTrainedModel:
    """The model as plain transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        # Views of the file's map start at odd addresses, and BLAS rounds by the address.
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of every token but the first of each window."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def streamed_gradient(folder: Path, tokens: Tensor) -> Tensor:
    """The loss's gradient at the first block's input, with one block in memory at a time."""
    skeleton = open_skeleton(folder)
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(tokens)
    states = [hidden]
    for number in range(len(skeleton)):
        with streamer.block(number) as block:
            states.append(block.run(states[-1], layer_inputs[number]))
    last = states[-1].detach().requires_grad_()
    with streamer.head() as head:
        gradient = torch.autograd.grad(_loss(head(last), tokens), last)[0]
    for number in reversed(range(len(skeleton))):
        with streamer.block(number) as block:
            gradient = block.differentiate(states[number], layer_inputs[number], gradient)
    return gradient


def _spoken(model: PreTrainedModel, prompt: Tensor) -> int:
    """How many tokens the model adds to ``prompt`` when asked for ``_ANSWER``."""
    answer = model.generate(
        prompt, max_new_tokens=_ANSWER, min_new_tokens=_ANSWER, do_sample=False, pad_token_id=0
    )
    return int(answer.shape[1]) - prompt.shape[1]


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in parts of the largest number of ``other``."""
    return float((one - other).abs().max()) / (float(other.abs().max()) or 1.0)


def _must_agree(what: str, one: Tensor, other: Tensor, within: float = _LOGITS) -> None:
    difference = _difference(one, other)
    if not difference <= within:  # NaN is none
        raise _WrongError(f"{what} differ by {difference:.1e} of the largest")


def _shares(
    model: PreTrainedModel, layers: str, left: dict[str, str]
) -> tuple[float, dict[str, float]]:
    """Shares of the numbers in the matrices of the blocks ``layers``.

    First of those that can be factored, then of each module in ``left``, which has the reasons
    why it cannot, by the name that ``inspect`` gives it.
    """
    numbers: dict[str, int] = {}
    for block in model.get_submodule(layers):
        for name, module in block.named_modules():
            short = re.sub(r"\b\d+\b", "*", name)
            matrices = (
                parameter
                for leaf, parameter in module.named_parameters(recurse=False)
                if parameter.dim() > 1 and not leaf.endswith("bias")  # experts have rows of them
            )
            numbers[short] = numbers.get(short, 0) + sum(p.numel() for p in matrices)
    total = sum(numbers.values())
    dense = {f"{name}: {why}": numbers.get(name, 0) / total for name, why in left.items()}
    return 1 - sum(dense.values()), dense


def _settings(folder: Path) -> dict[str, Any]:
    ours = ("quantization_config", "auto_map")
    return {name: value for name, value in config_of(folder).items() if name not in ours}


def _message(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_DETAIL]


def _failed(name: str, outcome: str, error: BaseException, folder: Path) -> Step:
    """A step that ended with ``error``; paths below ``folder`` are given without it."""
    text = " ".join(str(error).replace(f"{folder}/", "").split())[:_DETAIL]
    detail = text if outcome == REFUSED else f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/streamcomp/" in frame.filename] or frames[-1:]
    where = f"{ours[-1].filename.rpartition('/streamcomp/')[2]}:{ours[-1].lineno}"
    return Step(name, outcome, detail, where, "".join(traceback.format_exception(error))[-2000:])
