from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepPlan(_message.Message):
    __slots__ = ("epoch", "incarnation", "step", "retire_rows", "admits", "extend_rows", "extend_blocks", "swap_out", "swap_in", "copies", "forks", "told", "replaced", "branches", "rows", "num_tokens")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RETIRE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADMITS_FIELD_NUMBER: _ClassVar[int]
    EXTEND_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXTEND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SWAP_OUT_FIELD_NUMBER: _ClassVar[int]
    SWAP_IN_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    incarnation: int
    step: int
    retire_rows: bytes
    admits: _containers.RepeatedCompositeFieldContainer[Admit]
    extend_rows: bytes
    extend_blocks: bytes
    swap_out: bytes
    swap_in: bytes
    copies: bytes
    forks: _containers.RepeatedCompositeFieldContainer[Fork]
    told: bytes
    replaced: bytes
    branches: _containers.RepeatedCompositeFieldContainer[Fork]
    rows: bytes
    num_tokens: bytes
    def __init__(self, epoch: _Optional[int] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., retire_rows: _Optional[bytes] = ..., admits: _Optional[_Iterable[_Union[Admit, _Mapping]]] = ..., extend_rows: _Optional[bytes] = ..., extend_blocks: _Optional[bytes] = ..., swap_out: _Optional[bytes] = ..., swap_in: _Optional[bytes] = ..., copies: _Optional[bytes] = ..., forks: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ..., told: _Optional[bytes] = ..., replaced: _Optional[bytes] = ..., branches: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ..., rows: _Optional[bytes] = ..., num_tokens: _Optional[bytes] = ...) -> None: ...

class Admit(_message.Message):
    __slots__ = ("row", "token_ids", "num_prompt_tokens", "num_computed_tokens", "block_ids", "sampling")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    row: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: bytes
    sampling: Sampling
    def __init__(self, row: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("parent", "child", "seed")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CHILD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    parent: int
    child: int
    seed: int
    def __init__(self, parent: _Optional[int] = ..., child: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "stop_token_ids", "bias_token_ids", "bias_values", "logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    min_tokens: int
    stop_token_ids: bytes
    bias_token_ids: bytes
    bias_values: bytes
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., logprobs: _Optional[int] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("epoch", "incarnation", "step", "rank", "token_ids", "logprobs", "busy_us", "starved_us")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    STARVED_US_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    incarnation: int
    step: int
    rank: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    busy_us: int
    starved_us: int
    def __init__(self, epoch: _Optional[int] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ..., busy_us: _Optional[int] = ..., starved_us: _Optional[int] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("position", "token_ids", "values", "sampled_rank")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_RANK_FIELD_NUMBER: _ClassVar[int]
    position: int
    token_ids: bytes
    values: bytes
    sampled_rank: int
    def __init__(self, position: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., values: _Optional[bytes] = ..., sampled_rank: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("incarnation", "rank", "tensor_parallel_size", "device", "dtype", "num_blocks", "block_size", "bytes_per_block", "weight_bytes", "epoch", "step", "num_swap_blocks", "link_bytes_per_s", "prefill_tokens_per_s")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_SWAP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    rank: int
    tensor_parallel_size: int
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    bytes_per_block: int
    weight_bytes: int
    epoch: int
    step: int
    num_swap_blocks: int
    link_bytes_per_s: float
    prefill_tokens_per_s: float
    def __init__(self, incarnation: _Optional[int] = ..., rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., num_swap_blocks: _Optional[int] = ..., link_bytes_per_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...
