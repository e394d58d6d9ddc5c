"""LSTMs: features and tokens -> log-probabilities of the next token. Knows nothing of images or words.

To add a decoder, write a subclass of `Decoder` here and give it an entry in `DECODERS`.

I images and N captions in training, T positions of the longest caption, P positions of all captions together,
B images in a search, K beams, R regions, F channels of a region, E size of an embedding, H size of an LSTM's
state, V vocabulary.

In training all captions run as one packed sequence (`torch.nn.utils.rnn.PackedSequence`), so that no time is spent on
padding, which is 40 % of a batch of Flickr8k's captions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from imcap_ray.config import DecoderConfig
from imcap_ray.errors import ConfigError
from imcap_ray.models.beam_search import Candidates, Floats, Ints, NextTokens

State = tuple[Tensor, ...]
"""What a decoder remembers of the beams: tensors (B, K, ...)."""

Step = Callable[[Tensor, State], tuple[Tensor, State]]
"""Tokens (B, K) and state -> log-probabilities (B, K, V) of the next token, and the next state."""

_Product = Callable[[Tensor], Tensor]
"""Multiplies vectors (..., D) by a matrix and adds a bias."""


class Decoder(nn.Module):
    """Features (I, R, F) and tokens -> log-probabilities of the next token."""

    @abstractmethod
    def forward(self, features: Tensor, token_ids: Tensor, lengths: Tensor, image_of_caption: Tensor) -> Tensor:
        """Logits (P, V) of the token that follows each token, in the order of a packed sequence.

        Args:
            features: (I, R, F).
            token_ids: (N, T), from the start token on, the longest caption first.
            lengths: (N,) on the CPU, in descending order.
            image_of_caption: (N,) index into `features`.
        """

    state_sizes: tuple[int, ...]
    """Sizes of the tensors (B, K, size) of a search's state."""

    _frozen: Any = None
    """What `search_weights` has returned, once the weights do not change any more."""

    @abstractmethod
    def memory(self, features: Tensor, weights: Any) -> tuple[Tensor, ...]:
        """What the steps of a search need of the features (B, R, F): tensors (B, ...)."""

    @abstractmethod
    def step(self, tokens: Tensor, state: State, memory: tuple[Tensor, ...], weights: Any) -> tuple[Tensor, State]:
        """Tokens (B, K) and state to log-probabilities (B, K, V) of the next token and the next state."""

    def search_weights(self, *, packed: bool = False, exported: bool = False) -> Any:
        """What `memory` and `step` need of the weights.

        Args:
            packed: on a CPU, in the order in which torch's kernels read them.
            exported: for a graph that OpenVINO computes.
        """

    def freeze(self, *, packed: bool = True) -> None:
        """Compute once what searches need of the weights, which must not change from now on."""
        self._frozen = self.search_weights(packed=packed)

    def start(self, features: Tensor, beam_size: int) -> tuple[Step, State]:
        """The step function and the first state of a search over the images of features (B, R, F).

        Whatever depends on the features alone is computed here, once.
        """
        weights = self._frozen or self.search_weights()
        memory = self.memory(features, weights)
        state = tuple(features.new_zeros(len(features), beam_size, size) for size in self.state_sizes)
        return partial(self.step, memory=memory, weights=weights), state


@dataclass(frozen=True, slots=True, kw_only=True)
class _SearchProducts:
    """The matrix products of a search step of an `AttentionDecoder`.

    The first LSTM's gates are a sum over its inputs. The terms of the words and of the mean region are known before
    the search, which saves a quarter of a step's products.
    """

    word_gates: Callable[[Tensor], Tensor]
    """Tokens (...) -> what each word adds to the gates of the first LSTM (..., 4 H)."""
    image_gates: _Product
    """The mean region (..., H) -> what it adds to them."""
    history_gates: _Product
    """The first LSTM's last output (..., H) -> what it adds to them."""
    query: _Product
    language: _Product
    """The first LSTM's output, the attended vector and the second LSTM's last output (..., 3 H) -> its gates."""
    output: _Product
    logits: _Product
    is_exported: bool
    """Whether the memory holds the keys as OpenVINO's kernels read them: (B, heads, H / heads, R), already scaled."""


class AttentionDecoder(Decoder):
    """Attention over the regions between two LSTMs; the output layer shares the embedding's weights.

    The first LSTM reads the words and the mean region, and its output is the query of a multi-head attention over the
    regions (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2). The second LSTM reads the query and the attended
    vector and predicts the next word. The order is that of Up-Down (Anderson et al. 2018, arXiv 1707.07998, section
    3.2) without the feedback of the second LSTM into the first, so that in training each layer runs over all positions
    in one call.
    """

    def __init__(
        self,
        *,
        num_channels: int,
        vocabulary_size: int,
        embedding_size: int = 512,
        hidden_size: int = 512,
        num_heads: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.project_features = nn.Sequential(
            nn.Linear(num_channels, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU()
        )
        self.attention_lstm = nn.LSTM(embedding_size + hidden_size, hidden_size, batch_first=True)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.language_lstm = nn.LSTM(2 * hidden_size, hidden_size, batch_first=True)
        self.project_output = nn.Linear(2 * hidden_size, embedding_size)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
        self.state_sizes = (hidden_size,) * 4

    def forward(self, features: Tensor, token_ids: Tensor, lengths: Tensor, image_of_caption: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        keys, values, mean = self._memory(features)
        captions = torch.arange(len(lengths), device=token_ids.device)
        positions = _pack(captions.unsqueeze(1).expand_as(token_ids), lengths)
        caption_of_position = positions.data  # (P,)

        def drop(vectors: Tensor) -> Tensor:
            """Drop the same units of vectors (P, D) at all positions of a caption (Gal & Ghahramani 2016, arXiv
            1512.05287), which also takes a tenth of the random numbers."""
            if not self.training:
                return vectors
            mask: Tensor = self.dropout(vectors.new_ones(len(lengths), vectors.shape[1]))
            return vectors * mask.index_select(0, caption_of_position)

        words = drop(self.embedding(_pack(token_ids, lengths).data))
        image_mean = mean.index_select(0, image_of_caption.index_select(0, caption_of_position))
        hidden = run_lstm(self.attention_lstm, _repack(positions, torch.cat([words, image_mean], dim=-1)))
        hidden = _repack(positions, drop(hidden.data))  # (P, H)
        queries, _ = pad_packed_sequence(hidden, batch_first=True)  # (N, T, H): attention needs complete captions
        captions_of_image, cell_of_caption = _group_by_image(image_of_caption, len(features))
        grouped = queries[captions_of_image].flatten(1, 2)  # (I, captions of an image * T, H)
        with sdpa_kernel(SDPBackend.MATH):  # on the CPU the fused kernel's backward pass is five times slower
            attended = self.attend(self.query(grouped), keys, values)
        attended = attended.view(-1, *queries.shape[1:]).index_select(0, cell_of_caption)  # (N, T, H)
        attended = drop(_pack(attended, lengths).data)
        predicted = run_lstm(self.language_lstm, _repack(positions, torch.cat([hidden.data, attended], dim=-1))).data
        return self._logits(drop(self._output(predicted, attended)))

    def memory(self, features: Tensor, weights: _SearchProducts) -> tuple[Tensor, ...]:
        """Keys, values and what the mean region adds to the gates of the first LSTM."""
        keys, values, mean = self._memory(features)
        if weights.is_exported:
            keys = (keys * keys.shape[-1] ** -0.5).transpose(2, 3).contiguous()
        return keys, values, weights.image_gates(mean).unsqueeze(1)

    def step(
        self, tokens: Tensor, state: State, memory: tuple[Tensor, ...], weights: _SearchProducts
    ) -> tuple[Tensor, State]:
        """As `Decoder.step`."""
        keys, values, image_gates = memory
        word_gates = weights.word_gates(tokens)
        first = _next_state(word_gates + image_gates + weights.history_gates(state[0]), state[1])
        hidden = first[0]
        queries = weights.query(hidden)
        if weights.is_exported:
            attended = self.attend(queries, keys.transpose(2, 3), values, scale=1.0)
        else:
            attended = self.attend(queries, keys, values)
        second = _next_state(weights.language(torch.cat([hidden, attended, state[2]], dim=-1)), state[3])
        outputs = torch.tanh(weights.output(torch.cat([second[0], attended], dim=-1)))
        return functional.log_softmax(weights.logits(outputs), dim=-1), (*first, *second)

    @torch.no_grad()
    def search_weights(self, *, packed: bool = False, exported: bool = False) -> _SearchProducts:
        """As `Decoder.search_weights`."""
        linear = _packed_linear if packed else _linear
        input_weight, hidden_weight, input_bias, hidden_bias = self.attention_lstm.all_weights[0]
        word_weight, image_weight = input_weight.tensor_split([self.embedding.embedding_dim], dim=1)
        language: list[Tensor] = [*self.language_lstm.all_weights[0]]
        return _SearchProducts(
            word_gates=self._word_gates(word_weight, as_table=not exported),
            image_gates=linear(image_weight, input_bias + hidden_bias),
            history_gates=linear(hidden_weight, None),
            query=linear(self.query.weight, self.query.bias),
            language=linear(torch.cat(language[:2], dim=1), language[2] + language[3]),
            output=linear(self.project_output.weight, self.project_output.bias),
            logits=linear(self.embedding.weight, self.output_bias),
            is_exported=exported,
        )

    def _word_gates(self, weight: Tensor, *, as_table: bool) -> Callable[[Tensor], Tensor]:
        """Either look them up in a table (V, 4 H), or compute them, which takes less space in a file."""
        if as_table:
            return partial(functional.embedding, weight=functional.linear(self.embedding.weight, weight))
        return lambda tokens: functional.linear(functional.embedding(tokens, self.embedding.weight), weight)

    def attention(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """Attention weights (T, R) for the token that follows each token of a caption, averaged over the heads.

        Args:
            features: (R, F).
            token_ids: (T,) from the start token on.
        """
        keys, _, mean = self._memory(features.unsqueeze(0))
        words = self.embedding(token_ids).unsqueeze(0)  # (1, T, E)
        hidden = self.attention_lstm(torch.cat([words, mean.unsqueeze(1).expand(-1, words.shape[1], -1)], dim=-1))[0]
        queries = self._split_heads(self.query(hidden))  # (1, heads, T, H / heads)
        scores: Tensor = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
        return scores.softmax(dim=-1).mean(dim=1)[0]

    def _memory(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (I, heads, R, H / heads) and the mean region (I, H)."""
        projected = self.dropout(self.project_features(features))
        keys, values = self.key(projected), self.value(projected)
        return self._split_heads(keys), self._split_heads(values), projected.mean(dim=1)

    def _split_heads(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(*vectors.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float | None = None) -> Tensor:
        """The attended vectors (I, Q, H) of Q queries per image (I, Q, H), by keys and values from `_memory`."""
        attended = functional.scaled_dot_product_attention(self._split_heads(queries), keys, values, scale=scale)
        return attended.transpose(1, 2).flatten(2)

    def _output(self, predicted: Tensor, attended: Tensor) -> Tensor:
        vectors: Tensor = torch.tanh(self.project_output(torch.cat([predicted, attended], dim=-1)))
        return vectors

    def _logits(self, outputs: Tensor) -> Tensor:
        return functional.linear(outputs, self.embedding.weight, self.output_bias)


class MergeDecoder(Decoder):
    """The image's vector added to the output of an LSTM over the words, before the softmax ("merge" in Tanti et al.
    2017, arXiv 1708.02043)."""

    def __init__(
        self,
        *,
        num_channels: int,
        vocabulary_size: int,
        embedding_size: int = 256,
        hidden_size: int = 256,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.project_features = nn.Linear(num_channels, hidden_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.merge = nn.Linear(hidden_size, hidden_size)
        self.state_sizes = (hidden_size,) * 2
        self.output = nn.Linear(hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, token_ids: Tensor, lengths: Tensor, image_of_caption: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        hidden = run_lstm(self.lstm, _pack(self.dropout(self.embedding(token_ids)), lengths)).data  # (P, H)
        image_of_position = _pack(image_of_caption.unsqueeze(1).expand_as(token_ids), lengths).data
        return self._logits(hidden + self._image(features)[image_of_position])

    def memory(self, features: Tensor, weights: None) -> tuple[Tensor, ...]:
        """The image's vector."""
        return (self._image(features).unsqueeze(1),)

    def step(self, tokens: Tensor, state: State, memory: tuple[Tensor, ...], weights: None) -> tuple[Tensor, State]:
        """As `Decoder.step`."""
        hidden, state = _advance_lstm(self.lstm, self.embedding(tokens), state)
        return functional.log_softmax(self._logits(hidden + memory[0]), dim=-1), state

    def _image(self, features: Tensor) -> Tensor:
        return functional.relu(self.project_features(self.dropout(features.mean(dim=1))))

    def _logits(self, merged: Tensor) -> Tensor:
        logits: Tensor = self.output(functional.relu(self.merge(merged)))
        return logits


class DecoderEnsemble(nn.Module):
    """Decoders with the same vocabulary that search together: each step averages their log-probabilities.

    Args:
        channels: for each decoder, its channels among those of the features that `start` takes.
    """

    def __init__(self, decoders: Sequence[Decoder], channels: Sequence[slice]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self._members = list(zip(decoders, channels, strict=True))

    def freeze(self) -> None:
        """Compute once what searches need of the weights, which must not change from now on."""
        for decoder, _ in self._members:
            decoder.freeze()

    def start(self, features: Tensor, beam_size: int) -> tuple[Step, State]:
        """As `Decoder.start`. The state is the states of all decoders, one after the other."""
        starts = [decoder.start(features[..., channels], beam_size) for decoder, channels in self._members]

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            log_probs: list[Tensor] = []
            states: list[Tensor] = []
            first = 0
            for member_step, member_state in starts:
                last = first + len(member_state)
                member_log_probs, next_state = member_step(tokens, state[first:last])
                log_probs.append(member_log_probs)
                states.extend(next_state)
                first = last
            return torch.stack(log_probs).mean(dim=0).log_softmax(dim=-1), tuple(states)

        return step, tuple(tensor for _, state in starts for tensor in state)


def next_tokens(
    step: Step, state: State, *, num_candidates: int, end_id: int, forbidden_ids: Sequence[int] = ()
) -> NextTokens:
    """The function with which a beam search asks a decoder for candidates. It keeps the state of the beams.

    Args:
        state: each tensor (B, K, ...), equal along K.
        forbidden_ids: tokens that are never candidates.
    """
    state = tuple(tensor[:, :1] for tensor in state)
    device = state[0].device
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=device)

    def candidates(tokens: Ints, parents: Ints) -> Candidates:
        nonlocal state
        beams = torch.from_numpy(parents).to(device)
        log_probs, state = step(
            torch.from_numpy(tokens).to(device), tuple(_gather_beams(part, beams) for part in state)
        )
        log_probs = log_probs.float().index_fill_(-1, forbidden, float("-inf"))
        best = log_probs.topk(min(num_candidates, log_probs.shape[-1]), dim=-1)
        return Candidates(best.indices.cpu().numpy(), _to_numpy(best.values), _to_numpy(log_probs[..., end_id]))

    return candidates


def _to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.cpu().numpy()
    return array


def _gather_beams(tensor: Tensor, beams: Tensor) -> Tensor:
    """Rows `beams` (B, K') of a tensor (B, K, ...), per image: (B, K', ...)."""
    index = beams.reshape(*beams.shape, *(1,) * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(*beams.shape, *tensor.shape[2:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderArchitecture:
    """How to build a decoder, and what others need to know of it."""

    check: Callable[[DecoderConfig], None] = lambda config: None
    """Raises ConfigError if the configuration is invalid for this decoder."""
    build: Callable[[DecoderConfig, int, int], Decoder]
    """Configuration, number of channels and size of the vocabulary -> the decoder with random weights."""
    description: str
    """For the model card."""
    feature_weight: str
    """Name of the matrix (H, F) that reads the features; its width is the number of channels."""


def _check_heads(config: DecoderConfig) -> None:
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"decoder.num_heads must be a divisor of decoder.hidden_size ({config.hidden_size}), got {config.num_heads}"
        )


def _build_attention(config: DecoderConfig, num_channels: int, vocabulary_size: int) -> Decoder:
    return AttentionDecoder(
        num_channels=num_channels,
        vocabulary_size=vocabulary_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        dropout=config.dropout,
    )


def _build_merge(config: DecoderConfig, num_channels: int, vocabulary_size: int) -> Decoder:
    return MergeDecoder(
        num_channels=num_channels,
        vocabulary_size=vocabulary_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
    )


DECODERS: Final = {
    "attention": DecoderArchitecture(
        check=_check_heads,
        build=_build_attention,
        description="attention over the CNN's regions between two LSTMs",
        feature_weight="project_features.0.weight",
    ),
    "lstm": DecoderArchitecture(
        build=_build_merge,
        description="an LSTM merged with the image before the softmax",
        feature_weight="project_features.weight",
    ),
}


def find_decoder(config: DecoderConfig) -> DecoderArchitecture:
    """The architecture of this configuration; ConfigError if there is none, or the configuration is invalid for it."""
    architecture = DECODERS.get(config.name)
    if architecture is None:
        raise ConfigError(f"no decoder {config.name[:100]!r}: expected one of {', '.join(DECODERS)}")
    architecture.check(config)
    return architecture


def build_decoder(config: DecoderConfig, *, num_channels: int, vocabulary_size: int) -> Decoder:
    """The decoder of this configuration, with random weights."""
    return find_decoder(config).build(config, num_channels, vocabulary_size)


def _linear(weight: Tensor, bias: Tensor | None) -> _Product:
    return lambda vectors: functional.linear(vectors, weight, bias)


def _packed_linear(weight: Tensor, bias: Tensor | None) -> _Product:
    """The same product for weights that never change: on a CPU, oneDNN reorders them once instead of for every product.

    With the 48 vectors of 16 images' beams, a step's products take 5.1 ms instead of 6.9 (torch 2.14, one thread of an
    AMD EPYC). torch's compiler uses the same operators. They are not documented, and torch may be built without them.
    """
    if weight.device.type == "cpu":
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            torch.ops.mkldnn._linear_pointwise(weight[:1], packed, bias, "none", [], "")
        except (AttributeError, RuntimeError):
            return _linear(weight, bias)
        return lambda vectors: torch.ops.mkldnn._linear_pointwise(vectors, packed, bias, "none", [], "")
    return _linear(weight, bias)


def _pack(padded: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(padded, lengths, batch_first=True)


def _repack(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """A packed sequence of the same captions with other vectors (P, ...)."""
    return PackedSequence(data, packed.batch_sizes)


def _group_by_image(image_of_caption: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Group captions by image, so that keys and values need not be copied for each caption.

    Returns:
        A table (I, most captions of an image) of each image's captions, padded with caption 0, and the cell of each
        caption (N,) in it, counted row by row.
    """
    numbers = torch.arange(len(image_of_caption), device=image_of_caption.device)
    counts = image_of_caption.bincount(minlength=num_images)
    largest = int(counts.max())
    order = image_of_caption.argsort(stable=True)
    firsts = counts.cumsum(0) - counts
    cell_of_caption = torch.empty_like(numbers)
    cell_of_caption[order] = image_of_caption[order] * largest + numbers - firsts.repeat_interleave(counts)
    captions = numbers.new_zeros(num_images * largest)
    captions[cell_of_caption] = numbers
    return captions.view(num_images, largest), cell_of_caption


def run_lstm(lstm: nn.LSTM, inputs: PackedSequence) -> PackedSequence:
    """The hidden states of a one-layer LSTM at all positions; computed in float32 on a GPU.

    Under autocast torch always computes cuDNN's LSTM in float16 (ATen/cudnn/AutocastRNN.cpp), where small gradients
    become 0. On a CPU the backward pass of torch's LSTM builds a gradient of all positions' gates at each position and
    sums them up. Splitting the gates beforehand avoids that and makes a training step a fifth faster.
    """
    if inputs.data.is_cuda:
        with torch.autocast("cuda", enabled=False):
            outputs: PackedSequence = lstm(inputs.float())[0]
        return outputs
    input_weight, hidden_weight, input_bias, hidden_bias = lstm.all_weights[0]
    gates = functional.linear(inputs.data, input_weight, input_bias + hidden_bias)
    hidden = cell = gates.new_zeros(int(inputs.batch_sizes[0]), lstm.hidden_size)
    states = []
    for input_gates in torch.split(gates, inputs.batch_sizes.tolist()):
        count = len(input_gates)  # captions that are at least this long
        history_gates = functional.linear(hidden[:count], hidden_weight)
        hidden, cell = _next_state(input_gates + history_gates, cell[:count])
        states.append(hidden)
    return _repack(inputs, torch.cat(states))


def _next_state(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (..., 4 H) in torch's order and cell (..., H) -> the next hidden state and cell (Hochreiter &
    Schmidhuber 1997; torch.nn.LSTM's equations)."""
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell


def _advance_lstm(lstm: nn.LSTM, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """Compute one position of a one-layer LSTM for all beams. Inputs (B, K, ...) -> output (B, K, H), state."""
    shape = inputs.shape[:2]
    flat = tuple(tensor.flatten(0, 1).contiguous() for tensor in state)
    hidden, cell = torch.lstm_cell(inputs.flatten(0, 1), flat, *lstm.all_weights[0])
    hidden, cell = hidden.view(*shape, -1), cell.view(*shape, -1)
    return hidden, (hidden, cell)
