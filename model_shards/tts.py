"""The talker: text tokens and LLM hidden states of many sessions in, speech codes (25 per second) out.

Rule: the KV cache of a turn holds exactly the conditions and the codes that were given out, so that the next unit's
condition follows directly. The last code of a call is drawn but neither given out nor fed.

A unit goes like this (duplex): its text becomes condition rows, closed by one audio-begin row; up to 26 codes are
drawn, the last one is dropped. EOS is forbidden for the whole unit, so that it lasts exactly 25 codes, unless the unit
opens or closes its turn.

Source: MiniCPM-o 4.5 `modeling_minicpmo.py` (MiniCPMTTS.generate_chunk) and `DuplexCapability.streaming_generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards import kv_cache
from model_shards.attention import Kernel, Plan
from model_shards.audio import Projector
from model_shards.config import TtsConfig
from model_shards.errors import ModelError
from model_shards.fold import fold
from model_shards.kv_cache import KvCache
from model_shards.programs import frozen
from model_shards.sampling import NO_CODE, REPETITION_WINDOW, Sampling, draw, shape_logits

MAX_STEPS = 26  # 25 codes are one second, and one is dropped


@dataclass(slots=True)
class TalkerState:
    """What the talker keeps of one session.

    kv: [layers, 2, kv_heads, positions, head_dim], the whole turn so far; None before its first unit.
    generator: draws the codes; None takes the likeliest code each time.
    """

    generator: torch.Generator | None = None
    kv: Tensor | None = None
    next_position: int = 0
    turn_start: bool = True

    def end_turn(self) -> None:
        """Forget the turn: the next unit opens a new one. For the end of a turn and for barge-in."""
        self.kv, self.next_position, self.turn_start = None, 0, True


S = TypeVar("S", bound=TalkerState)


@dataclass(frozen=True, slots=True)
class TalkerInput:
    """One unit's text. token_ids: [n] int64; hidden: [n, llm_dim], the LLM's last hidden states at these tokens.

    n may be 0: nothing is said in this unit, but the speech goes on.
    """

    token_ids: Tensor
    hidden: Tensor
    end_of_turn: bool = False


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """One call of the decoder. condition: [rows, hidden_size], rows >= 1; EOS can't come in the first `min_steps`.

    history: codes from before this call that the repetition penalty sees (a duplex unit: none).
    """

    condition: Tensor
    min_steps: int
    max_steps: int
    history: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a call of the decoder gives: codes, all of them fed, and the draw which ended it (EOS, or one too many)."""

    codes: list[int]
    last_draw: int


def rope(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding: [...] positions -> two of [..., head_dim] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x by the angles of `rope`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self._fused: Tensor | None = None

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], kv: Tensor, columns: Tensor, mask: Tensor | None
    ) -> Tensor:
        """x: [batch, n, width]; kv: [2, batch, kv_heads, past + n, head_dim], of which `columns` [n] are written."""
        heads = self._project(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)  # type: ignore[no-untyped-call]
        kv[0].index_copy_(2, columns, rotate(k, *turn))
        kv[1].index_copy_(2, columns, v)
        mixed = F.scaled_dot_product_attention(rotate(q, *turn), kv[0], kv[1], mask, enable_gqa=self.grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def paged(self, x: Tensor, plan: Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
        """x: [tokens, width] of all sequences; pool: a layer's pages, of which the plan says which are whose."""
        q, k, v = self._project(x).view(len(x), -1, self.head_dim).split(self.heads, dim=1)  # type: ignore[no-untyped-call]
        mixed = plan.mix(kv_cache.rotate(q, *plan.rotation), kv_cache.rotate(k, *plan.rotation), v, pool)
        return self.o_proj(mixed)  # type: ignore[no-any-return]

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values beside each other: [..., all their heads * head_dim]."""
        if self._fused is not None:
            return F.linear(x, self._fused)
        return torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)

    def fold(self) -> None:
        self._fused = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).detach()
        del self.q_proj, self.k_proj, self.v_proj


class _Mlp(nn.Module):
    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._fused: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._fused is not None:
            gate, up = F.linear(x, self._fused).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]

    def fold(self) -> None:
        self._fused = torch.cat([self.gate_proj.weight, self.up_proj.weight]).detach()
        del self.gate_proj, self.up_proj


class Layer(nn.Module):
    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], kv: Tensor, columns: Tensor, mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, kv, columns, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def paged(self, x: Tensor, plan: Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn.paged(self.input_layernorm(x), plan, pool)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """A Llama decoder over embeddings (`tts.model.`).

    The checkpoint's `tts.model.embed_tokens.weight` [32000, hidden_size] is not held: it is always fed embeddings.
    """

    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def new_cache(self, batch: int, columns: int) -> Tensor:
        """Zeros: [layers, 2, batch, kv_heads, columns, head_dim]."""
        shape = (len(self.layers), 2, batch, self.config.num_key_value_heads, columns, self.head_dim)
        return self.norm.weight.new_zeros(shape)

    def forward(self, x: Tensor, positions: Tensor, kv: Tensor, column: int, mask: Tensor | None) -> Tensor:
        """Run n new rows behind the cached ones, and write their keys and values into the cache.

        x:         [batch, n, hidden_size].
        positions: [batch, n] int64.
        kv:        [layers, 2, batch, kv_heads, columns, head_dim]; the new rows go to columns `column` … `column` + n.
        mask:      bool, true where a row may look, or in x's dtype 0 there and -inf elsewhere, broadcast to [batch,
                   heads, n, column + n]; None: everywhere.
        returns:   [batch, n, hidden_size], after the last norm.
        """
        end = column + x.shape[1]
        return self.run(x, positions, kv[..., :end, :], torch.arange(column, end, device=x.device), mask)

    def run(self, x: Tensor, positions: Tensor, kv: Tensor, columns: Tensor, mask: Tensor | None) -> Tensor:
        """`forward` for a cache whose columns are all looked at, but for the mask: the new rows go to `columns` [n]."""
        cos, sin = rope(positions, self.head_dim, self.config.rope_theta)
        turn = (cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, kv[index], columns, mask)
        return self.norm(x)  # type: ignore[no-any-return]

    def paged(self, x: Tensor, plan: Plan, cache: KvCache) -> Tensor:
        """New rows [tokens, hidden_size] of many sequences, with keys and values in pages; gives the same shape."""
        for index, layer in enumerate(self.layers):
            x = cast(Layer, layer).paged(x, plan, cache.layer(index))
        return self.norm(x)  # type: ignore[no-any-return]


class _WeightNorm(nn.Module):
    """A matrix as length and direction of its rows. The names are those of torch's weight_norm in the checkpoint."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.original0 = nn.Parameter(torch.ones(rows, 1))
        self.original1 = nn.Parameter(torch.randn(rows, columns))

    def forward(self) -> Tensor:
        length = torch.linalg.vector_norm(self.original1, dim=1, keepdim=True, dtype=torch.float32)
        weight: Tensor = self.original1 * (self.original0 / length).to(self.original1.dtype)
        return weight


class CodeHead(nn.Module):
    """Hidden states to logits over the codes. The weight is composed once per call of the decoder, not per step."""

    def __init__(self, width: int, num_codes: int) -> None:
        super().__init__()
        self.parametrizations = nn.ModuleDict({"weight": _WeightNorm(num_codes, width)})
        self._folded: Tensor | None = None

    def weight(self) -> Tensor:
        """[codes, width]."""
        return self.parametrizations["weight"]() if self._folded is None else self._folded

    def fold(self) -> None:
        self._folded = self.weight().detach()
        self.parametrizations.clear()


class TalkerTower(nn.Module):
    """The weights under `tts.`. `projector_spk` is in every checkpoint, but no session has speaker rows."""

    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.emb_text = nn.Embedding(config.num_text_tokens, config.hidden_size)
        self.emb_code = nn.ModuleList([nn.Embedding(config.num_audio_tokens, config.hidden_size)])
        self.head_code = nn.ModuleList([CodeHead(config.hidden_size, config.num_audio_tokens)])
        self.projector_spk = Projector(config.llm_dim, config.hidden_size)
        self.projector_semantic = Projector(config.llm_dim, config.hidden_size)
        self.model = Backbone(config)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] as logits over the codes [..., codes]."""
        return F.linear(hidden, cast(CodeHead, self.head_code[0]).weight())

    def step(self, codes: Tensor, positions: Tensor, kv: Tensor, column: Tensor, mask: Tensor) -> Tensor:
        """Feed one code of each session; gives the logits of the next ones, [batch, codes].

        codes, positions: [batch] int64. kv: [layers, 2, batch, kv_heads, columns, head_dim], of which `column` [1] is
        written. mask: [batch, 1, 1, columns], 0 where a code may look, -inf elsewhere.
        """
        x = self.model.run(self.emb_code[0](codes)[:, None], positions[:, None], kv, column, mask)
        return self.logits(x[:, 0])

    def paged_step(self, codes: Tensor, used: Tensor, pages: Tensor, cache: KvCache, kernel: Kernel) -> Tensor:
        """As `step`, with keys and values in pages. used: [batch] int32, rows of each with this one. pages: [batch,
        any] int32.
        """
        x: Tensor = self.emb_code[0](codes)
        return self.logits(self.model.paged(x, Plan.of_steps(cache, used, pages, kernel, x.dtype), cache))


@dataclass(slots=True)
class _Row:
    """One session inside a running call."""

    state: TalkerState
    request: ChunkRequest
    codes: list[int] = field(default_factory=list)
    last_draw: int = NO_CODE

    @property
    def past(self) -> int:
        return 0 if self.state.kv is None else self.state.kv.shape[3]

    @property
    def rows(self) -> int:
        return self.request.condition.shape[0]

    @property
    def may_end(self) -> bool:
        return len(self.codes) >= self.request.min_steps


@dataclass(slots=True)
class _Run:
    """The sessions which still decode, and their shared cache.

    Columns of the cache: `past` for the earlier turn, `width` for the condition, both filled from the right so that
    all sessions end in the same column; then one per code.
    """

    rows: list[_Row]
    kv: Tensor  # [layers, 2, batch, kv_heads, columns, head_dim]
    visible: Tensor  # [batch, columns] bool
    seen: Tensor  # [batch, 1, 1, columns], 0 where visible, -inf elsewhere
    positions: Tensor  # [batch] int64, of the next code
    past: int
    width: int
    end: int  # columns filled
    window: int | None  # cached positions that a new one sees

    def finish(self, index: int) -> None:
        """Give a session its cache, without the holes, and its new position."""
        row, kv = self.rows[index], self.kv[:, :, index]
        past = kv[:, :, :, self.past - row.past : self.past]
        whole = torch.cat([past, kv[:, :, :, self.past + self.width - row.rows : self.end]], dim=3)
        row.state.kv = whole if self.window is None else whole[:, :, :, -self.window :].clone()
        row.state.next_position += row.rows + len(row.codes)

    def keep(self, staying: list[int]) -> None:
        """Go on with these sessions only."""
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in staying]
        self.kv = self.kv[:, :, staying]
        self.visible, self.seen = self.visible[staying], self.seen[staying]
        self.positions = self.positions[staying]

    def history(self) -> Tensor:
        """The codes so far, as far as the repetition penalty looks: [batch, steps] int64, NO_CODE on the left."""
        recent = [[*row.request.history, *row.codes][-REPETITION_WINDOW:] for row in self.rows]
        longest = max(map(len, recent))
        padded = [[NO_CODE] * (longest - len(codes)) + codes for codes in recent]
        return torch.tensor(padded, dtype=torch.int64, device=self.kv.device)

    def mask(self) -> Tensor:
        """What the next code sees, itself included: [batch, 1, 1, end + 1], 0 there and -inf elsewhere."""
        if self.window is None:
            return self.seen[..., : self.end + 1]
        visible = self.visible[:, : self.end + 1]
        age = visible.flip(1).cumsum(1).flip(1)  # 1 is the new code itself
        return additive(visible & (age <= self.window + 1), self.kv.dtype)[:, None, None]


class Talker(nn.Module):
    """`tts.`: speech codes for many sessions at once, each the same as alone."""

    max_sessions: Final[int | None] = None  # their caches come and go
    num_steps: Final = 1  # codes between two looks of the host

    def __init__(self, config: TtsConfig) -> None:
        super().__init__()
        self.config = config
        self.tts = TalkerTower(config)
        self._step: Callable[..., Tensor] = self.tts.step

    @property
    def eos(self) -> int:
        """The code that ends an utterance; it is never given out."""
        return self.config.num_audio_tokens - 1

    def new_state(self, seed: int | None) -> TalkerState:
        """Of a session; None takes the likeliest code each time."""
        if seed is None:
            return TalkerState()
        return TalkerState(torch.Generator(self.tts.emb_text.weight.device).manual_seed(seed))

    def condition(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """What is said, and how: [n] int64 and [n, llm_dim] -> [n, hidden_size]."""
        manner = self.tts.projector_semantic(hidden.to(self.tts.emb_text.weight.dtype))
        if self.config.normalize_projected_hidden:
            manner = F.normalize(manner, dim=-1)
        return self.tts.emb_text(token_ids) + manner  # type: ignore[no-any-return]

    def text_row(self, token_id: int) -> Tensor:
        """One row of the text table, e.g. the audio-begin row that closes a condition: [1, hidden_size]."""
        return self.tts.emb_text.weight[token_id : token_id + 1]

    def generate(self, batch: Sequence[tuple[TalkerState, TalkerInput]]) -> list[list[int]]:
        """Speak one unit of each session: 25 codes, or 0 to 25 where a turn opens or closes. Moves the states on."""
        spoken = self.generate_chunks(self.requests(batch), duplex_sampling(self.config))
        end_units(batch)
        return [chunk.codes for chunk in spoken]

    def requests(self, batch: Sequence[tuple[S, TalkerInput]]) -> list[tuple[S, ChunkRequest]]:
        """What the decoder is asked for one unit of each session."""
        if not batch:
            return []
        units = [unit for _, unit in batch]
        said = self.condition(torch.cat([unit.token_ids for unit in units]), torch.cat([unit.hidden for unit in units]))
        begin = self.text_row(self.config.audio_bos_token_id)
        requests: list[tuple[S, ChunkRequest]] = []
        per_unit = torch.split(said, [len(unit.token_ids) for unit in units])
        for (state, unit), rows in zip(batch, per_unit, strict=True):
            min_steps = 0 if state.turn_start or unit.end_of_turn else MAX_STEPS
            requests.append((state, ChunkRequest(torch.cat([rows, begin]), min_steps, MAX_STEPS)))
        return requests

    def generate_chunks(
        self, batch: Sequence[tuple[TalkerState, ChunkRequest]], sampling: Sampling, window: int | None = None
    ) -> list[Spoken]:
        """Decode until EOS or `max_steps` draws. With a `window` a code sees so many cached positions, and they stay.

        Moves cache and position of the states on; where a turn starts and ends is the caller's.

        A session whose turn would pass `max_position_embeddings` (90 s of speech) goes on with an empty cache; the
        official code has no limit here, and leaves the range which the talker was trained on.
        """
        refuse_twice(batch)
        rows = [_Row(state, request) for state, request in batch]
        if rows:
            self._decode(rows, sampling, window)
        return [Spoken(row.codes, row.last_draw) for row in rows]

    def fold(self) -> None:
        """See `model_shards.fold`. On a CPU, a step becomes one program besides."""
        fold(self.tts)
        kv = self.tts.model.new_cache(batch=2, columns=3)
        if kv.device.type == "cpu":
            ones, mask = torch.ones(2, dtype=torch.int64), kv.new_zeros(2, 1, 1, 3)
            self._step = frozen(self.tts.step, (ones, ones, kv, ones[:1], mask))

    def _decode(self, rows: list[_Row], sampling: Sampling, window: int | None) -> None:
        run, logits = self._prefill(rows, window)
        while run.rows:
            logits = shape_logits(logits, run.history(), sampling)
            forbidden = [index for index, row in enumerate(run.rows) if not row.may_end]
            if forbidden:
                logits[forbidden, self.eos] = -torch.inf
            codes = draw(logits.softmax(dim=-1), [row.state.generator for row in run.rows])
            run.keep([index for index, code in enumerate(codes) if self._goes_on(run, index, code)])
            if run.rows:
                logits = self._next(run)

    def _goes_on(self, run: _Run, index: int, code: int) -> bool:
        row = run.rows[index]
        if code == self.eos or len(row.codes) + 1 == row.request.max_steps:
            row.last_draw = code
            run.finish(index)
            return False
        row.codes.append(code)
        return True

    def _prefill(self, rows: list[_Row], window: int | None) -> tuple[_Run, Tensor]:
        """Feed the conditions; gives the run and the logits behind each condition, [batch, codes]."""
        for row in rows:
            if row.state.next_position + row.rows + row.request.max_steps > self.config.max_position_embeddings:
                row.state.kv, row.state.next_position = None, 0
        past, width = max(row.past for row in rows), max(row.rows for row in rows)
        columns = past + width + max(row.request.max_steps for row in rows) - 1
        kv = self.tts.model.new_cache(len(rows), columns)
        x = kv.new_zeros(len(rows), width, self.config.hidden_size)
        for index, row in enumerate(rows):
            x[index, width - row.rows :] = row.request.condition
            if row.state.kv is not None:
                kv[:, :, index, :, past - row.past : past] = row.state.kv
        visible, mask, positions = _layout(rows, past, width, columns, kv.device)
        hidden = self.tts.model(x, positions, kv, past, mask)[:, -1]
        seen = additive(visible, kv.dtype)[:, None, None]
        run = _Run(rows, kv, visible, seen, positions[:, -1] + 1, past, width, past + width, window)
        return run, self.tts.logits(hidden)

    def _next(self, run: _Run) -> Tensor:
        """Feed the latest codes; gives the logits of the next ones, [batch, codes]."""
        latest = torch.tensor([row.codes[-1] for row in run.rows], device=run.kv.device)
        column = torch.tensor([run.end], device=run.kv.device)
        kv = run.kv[..., : run.end + 1, :]
        logits = self._step(latest, run.positions, kv, column, run.mask())
        run.end += 1
        run.positions = run.positions + 1
        return logits


def duplex_sampling(config: TtsConfig) -> Sampling:
    """How codes are drawn in a duplex session."""
    return Sampling(config.temperature, config.repetition_penalty)


def end_units(batch: Sequence[tuple[TalkerState, TalkerInput]]) -> None:
    """These units have been spoken."""
    for state, unit in batch:
        state.turn_start = False
        if unit.end_of_turn:
            state.end_turn()


def refuse_twice(batch: Sequence[tuple[TalkerState, ChunkRequest]]) -> None:
    if len({id(state) for state, _ in batch}) < len(batch):
        raise ModelError("talker: a session's units must be spoken one after the other, not in one batch")


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as attention adds it: 0 where true, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _layout(
    rows: Sequence[_Row], past: int, width: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which columns are filled [batch, columns], what each condition row sees [batch, 1, width, past + width], and
    the positions of the condition rows [batch, width].

    A hole among the condition rows looks at everything before it: its result is dropped, but it must be a number.
    """
    pasts = torch.tensor([row.past for row in rows], device=device)[:, None]
    holes = width - torch.tensor([row.rows for row in rows], device=device)[:, None]
    starts = torch.tensor([row.state.next_position for row in rows], device=device)[:, None]
    column, query = torch.arange(columns, device=device), torch.arange(width, device=device)
    visible = ((column >= past - pasts) & (column < past)) | (column >= past + holes)
    earlier = column[: past + width] <= past + query[:, None]
    mask = (visible[:, None, : past + width] | (query < holes)[:, :, None]) & earlier
    return visible, mask[:, None], (starts + query - holes).clamp(min=0)
