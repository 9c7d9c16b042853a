"""The memory model: tracing against what autograd really saves, the composition by hand, and measured peaks."""

from pathlib import Path

import pytest
import torch

from blocks.block import Block
from errors import InputError
from model.context import SequenceContext
from model.hybrid import MIXERS
from training.config import load_config
from training.plan_measure import measure, on_this_cpu
from training.plan_memory import PREFLIGHT, PROBE, STEP, Replay, Stack, largest
from training.plan_trace import Held, trace_block, trace_head
from training.recompute import recompute

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
ROWS, LENGTH = 2, 256


def demo_model():
    return load_config(DEMO).model


def really_saved(letter, dtype):
    """Bytes of the distinct storages that a real block's graph holds, and of its output."""
    config = demo_model()
    mixer_class, name = MIXERS[letter]
    block = Block(letter, config.d_model, mixer_class(config.d_model, getattr(config, name)), config.norm_eps)
    block.mixer.init_weights(1)
    hidden = torch.randn(ROWS, LENGTH, config.d_model, requires_grad=True)
    context = SequenceContext.single_documents(torch.zeros(ROWS, LENGTH, dtype=torch.int64))
    layout = [value for value in vars(context).values() if isinstance(value, torch.Tensor)]
    given = [*block.parameters(), *block.buffers(), hidden, *layout]
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block(hidden, context)
    return sum(size for size, _ in held.values()) + y.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("letter", "AMER")
def test_what_is_kept_is_what_autograd_saves(letter, dtype):
    traced = trace_block(demo_model(), letter, ROWS, LENGTH, dtype, "none", "cpu")
    assert traced.kept == pytest.approx(really_saved(letter, dtype), rel=0.01)


@pytest.mark.parametrize("letter", "AMER")
@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_recomputation_keeps_less_and_full_keeps_the_output_alone(letter, kernels):
    none, selective, full = (
        trace_block(demo_model(), letter, ROWS, LENGTH, torch.bfloat16, kind, kernels)
        for kind in ("none", "selective", "full")
    )
    assert full.kept == full.output == ROWS * LENGTH * demo_model().d_model * 4
    assert full.kept < selective.kept < none.kept
    assert none.parameters == selective.parameters == full.parameters


@pytest.mark.parametrize("letter", "AM")
def test_activations_grow_with_the_tokens(letter):
    one, two, four = (
        trace_block(demo_model(), letter, rows, 128, torch.bfloat16, "none", "cuda").kept for rows in (1, 2, 4)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_tracing_leaves_the_blocks_as_they_were():
    before = {name: vars(module).copy() for name, module in _kernel_modules()}
    trace_block(demo_model(), "M", 1, 64, torch.bfloat16, "none", "cuda")
    assert {name: vars(module) for name, module in _kernel_modules()} == before


def _kernel_modules():
    import torch.nn.functional

    import blocks.ablock
    from blocks.kernels import causal_conv, grouped_experts, m2rnn_mixer, mamba2, qk_norm_rope, ssd

    found = (torch.nn.functional, blocks.ablock, causal_conv, grouped_experts, m2rnn_mixer, mamba2, qk_norm_rope, ssd)
    return [(module.__name__, module) for module in found]


def by_hand(**changes):
    """Two blocks of 100 parameters, kept 50 beyond an output of 10; a head of 30 and an embedding of 20."""
    block = Held(100, 10, 60, 60, 80, 500)
    head = Held(30, 0, 5, 5, 7, 9)
    return Stack(**{"blocks": (block, block), "head": head, "embedding": 20, "tied": False, "state": 10, **changes})


def test_the_peak_of_one_process_by_hand():
    stack = by_hand()
    peak = largest(Replay(stack).step())
    assert (stack.root, stack.parameters) == (50, 250)
    assert peak.moment == "backward of block 1"  # the head's and the last block's gradients are there by then
    assert (peak.weights, peak.gradients, peak.optimizer, peak.gathered) == (1000, 4 * 130, 2000, 0)
    assert peak.states == 4 * 10
    assert (peak.activations, peak.working) == (50, 500 - 10 - 50)
    assert peak.total == 1000 + 520 + 2000 + 40 + 490


def test_gradients_are_there_all_the_time_when_they_accumulate():
    peak = largest(Replay(by_hand(), accumulates=True).step())
    assert (peak.moment, peak.gradients) == ("backward of block 2", 1000)


def test_forward_holds_the_states_so_far_and_none_of_the_pass_before():
    block = Held(1, 1000, 1000, 1000, 5000, 1001)
    peak = largest(Replay(by_hand(blocks=(block, block), state=1000)).step())
    assert (peak.moment, peak.states) == ("forward of block 2", 2000)


def test_shards_cut_what_is_kept_and_add_what_is_gathered():
    whole, cut = largest(Replay(by_hand()).step()), largest(Replay(by_hand(), shards=10, gathers=True).step())
    assert (cut.weights, cut.optimizer) == (whole.weights // 10, whole.optimizer // 10)
    assert cut.gathered == 4 * (50 + 3 * 100)


def test_the_root_s_gradient_is_whole_until_the_end_where_weights_are_gathered():
    cut = largest(Replay(by_hand(), shards=10, gathers=True).step())
    assert (cut.moment, cut.gradients) == ("backward of block 2", 4 * 30)
    again = largest(Replay(by_hand(), shards=10, gathers=True, accumulates=True).step())
    assert again.gradients == 4 * 30 + 4 * 250 // 10
    wide = largest(Replay(by_hand(embedding=20_000), shards=10, gathers=True).step())
    root = 20_000 + 30
    assert (wide.moment, wide.working) == ("reduction of the root", 4 * root)
    assert wide.gradients == 4 * (root + 200) // 10 + 4 * root


def test_a_tied_head_is_counted_once():
    config = load_config(DEMO, ["model.head=tied", "model.pattern=E"])
    stack = Stack.trace(config.model, 512, 1, 64, torch.float32, "none", "cpu")
    from training.summary import meta_model, parameter_counts

    assert stack.parameters == parameter_counts(meta_model(config, 512))["total"]


def test_the_head_keeps_its_gradients_and_not_its_logits():
    held = trace_head(demo_model(), 4096, 4, 512, torch.float32, "cpu")
    tokens, d_model = 4 * 512, demo_model().d_model
    # the norm's own copy, its result, that one's gradient; the gradient of the weight
    assert held.kept == pytest.approx(4 * (3 * tokens * d_model + 4096 * d_model), rel=0.02)
    assert held.kept < tokens * 4096 * 4


SIZES = [
    "model.d_model=256",
    "model.moe.expert_ff=256",
    "model.attention.n_heads=4",
    "data.sequence_length=1024",
    "data.tokenizer.vocab_size=8192",
]
# name -> parallel.recompute, what is done, overrides
CASES = {
    "float32": ("none", STEP, ["model.pattern=AEMR", "precision=fp32"]),
    "bf16 selective": ("selective", STEP, ["model.pattern=AEMR", "precision=bf16"]),
    "experts": ("none", STEP, ["model.pattern=EEE", "precision=fp32", "train.accumulation=2"]),
    "full": ("full", STEP, ["model.pattern=MAR", "precision=fp32"]),
    "preflight": ("none", PREFLIGHT, ["precision=fp32"]),
    "preflight, large vocabulary": ("selective", PREFLIGHT, ["precision=bf16", "data.tokenizer.vocab_size=32768"]),
    "preflight, without embedding": ("full", PREFLIGHT, ["precision=fp32", "stp.boundaries=changes"]),
    "probing": ("none", PROBE, ["model.pattern=AEMR", "precision=fp32"]),
    "probing selective": ("selective", PROBE, ["model.pattern=AEMR", "precision=bf16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_peaks_are_the_measured_ones_within_a_tenth(name):
    kind, during, own = CASES[name]
    overrides = [*SIZES, *own]
    config = load_config(DEMO, overrides)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    predicted = on_this_cpu(config, dtype, kind)[during].total
    measured = measure(DEMO, overrides, kind, during)
    assert predicted == pytest.approx(measured, rel=0.1), predicted / measured


def documented():
    """Rows of the table of docs/scaling.md: stack, rows, precision, recompute, what; predicted, measured, ratio."""
    lines = (DEMO.parents[1] / "docs/scaling.md").read_text().partition("| stack | rows |")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip(" |").split("|")] for line in lines]
    return cells[: cells.index([""])]


@pytest.mark.parametrize("row", documented(), ids=lambda row: " ".join(row[:5]))
def test_the_documented_predictions_are_those_of_now(row):
    stack, rows, precision, kind, during, predicted, measured, ratio = row
    overrides = [*SIZES, f"model.pattern={stack}", f"precision={precision}"]
    if " x " in rows:
        overrides.append("train.accumulation=" + rows.split(" x ")[1])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    found = on_this_cpu(load_config(DEMO, overrides), dtype, kind)[during].total
    predicted, measured = (int(number.replace(",", "")) for number in (predicted, measured))
    assert found / 2**20 == pytest.approx(predicted, rel=0.01)
    assert predicted / measured == pytest.approx(float(ratio), abs=0.002)


def test_measuring_says_where_it_cannot(monkeypatch):
    monkeypatch.setattr("training.plan_measure.PEAK_RESET", Path("/nowhere"))
    with pytest.raises(InputError, match="needs Linux"):
        measure(DEMO, [], "none")


def test_recompute_is_the_one_of_training():
    """The wrapper that is traced is the wrapper that runs."""
    config = demo_model()
    block = Block("E", config.d_model, MIXERS["E"][0](config.d_model, config.moe), config.norm_eps)
    forward = block.forward
    recompute(block, "full")
    assert block.forward is not forward
