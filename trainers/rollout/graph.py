"""
The decoding loop for CUDA: a static cache, and one CUDA graph of the token step.

A token step of a small model is some hundred kernels of a few microseconds each, and launching them one by one takes
ten times as long as running them. A graph is launched at once. It holds the forward, the draw of the tokens and their
bookkeeping, so the host has nothing to do but to ask every few steps whether all rows have ended. A graph replays
fixed addresses: the cache, the rows' state and the adapter's copy in the base's dtype stay where they are, and what was
captured once for a shape serves the whole run.

Not covered: what `why_not_covered` names. The step without the graph runs on any device, so tests compare it with the
other loops on a CPU.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache, StaticLayer

from ..adapters import adapter_in_base_dtype, base_model
from ..device import free_memory
from .prefill import next_token_logits, pad_left
from .sampling import sample_tokens

logger = logging.getLogger(__name__)

# Token steps between two questions to the device whether all rows have ended
CHECK_EVERY = 16
# The cache's length is rounded up to a multiple, so that few shapes occur in a run
LENGTH_MULTIPLE = 256
# Prompt tokens, padding included, of one forward of the prefill
PREFILL_TOKENS = 8192
# Bytes for each entry of the vocabulary and row while a token is drawn: logits, probabilities, and what a sort takes
SAMPLING_BYTES = 56
# Share of the free memory that the rows of a chunk may take; prefill and attention need some, too
MEMORY_SHARE = 0.8
# Share of the free memory that token steps may keep between rollouts; a larger one is captured at every rollout
KEPT_SHARE = 0.1
# Stands in `TokenStep.completions` where a row has ended
NO_TOKEN = -1


def why_not_covered(base: PreTrainedModel) -> str | None:
    """
    Return why this loop does not cover a model.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base model, not wrapped by PEFT.

    Returns:
        `str` or `None`: The reason, or `None` if it covers it.
    """
    config = base.config
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        return "it is more than a decoder of text"
    if not base._can_compile_fullgraph:
        return "transformers does not list it among the models that run in one graph"
    if any(type(layer) is not StaticLayer for layer in StaticCache(config=config, max_cache_len=1).layers):
        return "its cache has other layers than those of full attention (a sliding window, a state)"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values are latent, so that the bytes of its cache are not known beforehand"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r}, and only 'sdpa' takes the mask of a static cache"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return f"its rotary embedding of type {rope['rope_type']!r} depends on the length"
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        return "it is spread over several devices"
    return None


def bytes_per_row(config: PreTrainedConfig, dtype: torch.dtype, length: int) -> int:
    """
    Return the memory that a row of a rollout takes: its keys and values, and the draw of its tokens.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The base model's configuration.
        dtype (`torch.dtype`):
            Dtype of keys and values.
        length (`int`):
            Length of the cache.

    Returns:
        `int`: Bytes.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize
    return length * keys_and_values + SAMPLING_BYTES * config.vocab_size


class TokenStep:
    """
    The state of a rollout's rows, in buffers that stay where they are, and the step that gives each row a token.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base model. The step keeps no reference to it.
        rows (`int`):
            Number of rows.
        length (`int`):
            Tokens of the longest prompt and of the longest completion together, at most.
        eos_token_ids (`tuple[int, ...]`):
            Tokens that end a completion.
        sampling (`tuple[float, float, int]`):
            Temperature, top-p and top-k.
        use_graph (`bool`):
            Whether to capture the step in a CUDA graph. A step that waits for the device cannot be captured: it runs
            without a graph, which the log says.

    Raises:
        RuntimeError: If the capture fails for another reason.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        rows: int,
        length: int,
        eos_token_ids: tuple[int, ...],
        sampling: tuple[float, float, int],
        use_graph: bool,
    ):
        device = base.get_output_embeddings().weight.device
        self.sampling = sampling
        self.num_bytes = rows * bytes_per_row(base.config, base.get_input_embeddings().weight.dtype, length)
        self.eos = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
        self.cache = StaticCache(config=base.config, max_cache_len=length)
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)  # slots of the cache that count
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # where in the cache the next token goes
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)  # the last ones drawn
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)  # theirs
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.num_drawn = torch.zeros(1, dtype=torch.long, device=device)
        self.completions = torch.full((rows, length), NO_TOKEN, device=device)
        self.num_prompts = 0
        self.graph = None
        # These steps compute nothing that is used: the first one allocates the cache in the shape and dtype that the
        # model's layers give it. They must not advance the random numbers, or a run that continues would draw others.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.run(base)
            if use_graph:
                self._capture(base)

    def _capture(self, base: PreTrainedModel) -> None:
        stream = torch.cuda.Stream()  # a capture needs libraries that are initialized on a side stream
        stream.wait_stream(torch.cuda.current_stream())
        # What waits for the device is found before the capture, which it would leave in a state without a way back
        sync_debug_mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(action="ignore"):  # torch's, that the mode does not find everything
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                self.run(base)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            logger.warning(
                f"the token step of {base.config.model_type} runs without a CUDA graph, which is slower: {error}"
            )
            return
        finally:
            torch.cuda.set_sync_debug_mode(sync_debug_mode)
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on using the GPU
                self.run(base)
        except RuntimeError as error:
            raise RuntimeError(
                f"the token step cannot be captured in a CUDA graph: {error}. Training can do without, at the speed of "
                "transformers' `generate`: set cache_implementation to 'dynamic'"
            ) from error
        self.graph = graph

    def run(self, base: PreTrainedModel) -> None:
        """Compute the next token of every row, without the graph."""
        self.mask.index_fill_(3, self.slot, True)
        logits = next_token_logits(
            base,
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
        )
        self.slot.add_(1)
        self.positions.add_(1)
        self.draw(logits)

    def draw(self, logits: torch.Tensor) -> None:
        """Draw the next token of every row from its logits."""
        drawn = sample_tokens(logits, *self.sampling, in_graph=True).masked_fill(self.ended, NO_TOKEN)
        self.completions.index_copy_(1, self.num_drawn, drawn[:, None])
        self.num_drawn.add_(1)
        self.ended.logical_or_((drawn[:, None] == self.eos).any(-1))
        self.tokens.copy_(drawn.clamp(min=0)[:, None])

    def prefill(self, base: PreTrainedModel, prompt_ids: list[list[int]]) -> None:
        """
        Start a rollout: compute each different prompt once, copy it into its rows, and draw the first tokens.

        Args:
            base ([`~transformers.PreTrainedModel`]):
                The base model.
            prompt_ids (`list[list[int]]`):
                Token ids of each row's prompt. Rows beyond them count as ended.
        """
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row in range(len(self.ended)):
            rows_of.setdefault(tuple(prompt_ids[row if row < len(prompt_ids) else 0]), []).append(row)
        prompts = sorted(rows_of, key=len)
        longest = len(prompts[-1])
        prompts_a_forward = max(1, PREFILL_TOKENS // longest)
        self.mask.zero_()
        self.cache.reset()  # a NaN of an earlier rollout would pass the mask
        all_rows, all_logits = [], []
        for first in range(0, len(prompts), prompts_a_forward):
            group = prompts[first : first + prompts_a_forward]
            input_ids, mask = pad_left(group, self.mask.device)
            cache = DynamicCache(config=base.config)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = next_token_logits(
                base, input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            rows = torch.tensor([row for prompt in group for row in rows_of[prompt]], device=mask.device)
            source = torch.tensor([i for i, prompt in enumerate(group) for _ in rows_of[prompt]], device=mask.device)
            slots = slice(longest - input_ids.size(1), longest)  # the prompts end where the completions start
            for ours, prefilled in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    getattr(ours, name)[rows, :, slots] = getattr(prefilled, name)[source]
            self.mask[rows, 0, 0, slots] = mask[source].bool()
            self.positions[rows] = mask.sum(-1, keepdim=True)[source]
            all_rows.append(rows)
            all_logits.append(logits[source])
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(longest)
        self.slot.fill_(longest)
        self.ended.zero_()
        self.ended[len(prompt_ids) :] = True
        self.num_prompts = len(prompt_ids)
        self.completions.fill_(NO_TOKEN)
        self.num_drawn.zero_()
        self.draw(torch.cat(all_logits)[torch.cat(all_rows).argsort()])

    def decode(self, base: PreTrainedModel, max_tokens: int, on_ended: Callable[[int], None] | None) -> list[list[int]]:
        """
        Draw tokens until every row has ended.

        Args:
            base ([`~transformers.PreTrainedModel`]):
                The base model.
            max_tokens (`int`):
                Maximum tokens of a row, the first one included.
            on_ended (`Callable[[int], None]`, *optional*):
                Called now and then with the number of rows that ended since.

        Returns:
            `list[list[int]]`: The tokens drawn for each prompt.
        """
        num_ended = 0
        for num_drawn in range(1, max_tokens + 1):
            if num_drawn > 1 and self.graph is not None:
                self.graph.replay()
            elif num_drawn > 1:
                self.run(base)
            if num_drawn % CHECK_EVERY == 0 or num_drawn == max_tokens:
                ended = int(self.ended[: self.num_prompts].sum())
                if on_ended is not None:
                    on_ended(ended - num_ended)
                num_ended = ended
                if ended == self.num_prompts:
                    break
        completions = self.completions[: self.num_prompts, :max_tokens].tolist()
        return [[token for token in row if token != NO_TOKEN] for row in completions]


@dataclass
class _Kept:
    """What stays of a model's rollouts: the adapter's copies, and the token steps by shape, the latest used last."""

    copies: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    steps: dict[tuple, TokenStep] = field(default_factory=dict)
    weights: tuple = ()  # what the steps were captured with

    def forget_steps_of_other_weights(self, model: nn.Module) -> None:
        """Forget the steps if a graph would read weights where they no longer are, or compute with another adapter."""
        weights = (
            *(parameter.data_ptr() for parameter in model.parameters()),
            *(
                (layer.disable_adapters, layer.merged, *layer.active_adapters)
                for layer in model.modules()
                if isinstance(layer, BaseTunerLayer)
            ),
        )
        if weights != self.weights:
            self.steps.clear()
            self.weights = weights

    def forget_large_steps(self, device: torch.device) -> None:
        """Forget the steps that would take too much of the memory that the backward needs, the oldest first."""
        free = free_memory(device)
        while free is not None and sum(step.num_bytes for step in self.steps.values()) > KEPT_SHARE * free:
            del self.steps[next(iter(self.steps))]


_KEPT: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()


def graph_completions(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    eos_token_ids: list[int],
    max_completion_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    on_ended: Callable[[int], None] | None = None,
    use_graph: bool | None = None,
) -> list[list[int]]:
    """
    Complete a batch of prompts as [`generate_completions`] does, which calls this.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, in eval mode.
        prompt_ids, eos_token_ids, max_completion_length, temperature, top_p, top_k, on_ended:
            As in [`generate_completions`].
        use_graph (`bool`, *optional*):
            Whether to capture the token step. If not set, `True` on CUDA, which alone can.

    Returns:
        `list[list[int]]`: Each completion's token ids.
    """
    base = base_model(model)
    device = base.get_output_embeddings().weight.device
    use_graph = device.type == "cuda" if use_graph is None else use_graph
    length = -(-(max(map(len, prompt_ids)) + max_completion_length) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    row_bytes = bytes_per_row(base.config, base.get_input_embeddings().weight.dtype, length)
    settings = (tuple(eos_token_ids), (temperature, top_p, top_k), use_graph)
    rows = 1 << (len(prompt_ids) - 1).bit_length()  # a power of two: few shapes, and idle rows cost little
    kept = _KEPT.setdefault(base, _Kept())
    with adapter_in_base_dtype(model, kept.copies):
        kept.forget_steps_of_other_weights(model)
        if (rows, length, *settings) not in kept.steps and _rows_that_fit(rows, row_bytes, device) < rows:
            kept.steps.clear()
            rows = _rows_that_fit(rows, row_bytes, device)
        key = (rows, length, *settings)
        step = kept.steps.pop(key, None) or TokenStep(base, rows, length, *settings)
        kept.steps[key] = step
        completions = []
        for first in range(0, len(prompt_ids), rows):
            step.prefill(base, prompt_ids[first : first + rows])
            completions += step.decode(base, max_completion_length, on_ended)
        kept.forget_large_steps(device)
    return completions


def _rows_that_fit(rows: int, row_bytes: int, device: torch.device) -> int:
    """Halve a number of rows until they fit the device's memory."""
    free = free_memory(device)
    while free is not None and rows > 1 and rows * row_bytes > MEMORY_SHARE * free:
        rows //= 2
    return rows
