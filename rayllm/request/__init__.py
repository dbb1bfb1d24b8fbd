"""What a user asks for, and what answers it: sampling parameters, a request, its outputs. Plain Python, no torch."""

from rayllm.request.outputs import CompletionOutput, Logprob, OutputError, RequestMetrics, RequestOutput
from rayllm.request.prompts import TextPrompt, TokenIds, TokensPrompt
from rayllm.request.request import Request, Retention
from rayllm.request.sampling_params import (
    DEFAULT_MAX_LOGPROBS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from rayllm.request.structured_outputs import STRUCTURED_KINDS, StructuredOutputsParams
from rayllm.request.token_ids import pack_ids, unpack_ids

__all__ = [
    "DEFAULT_MAX_LOGPROBS",
    "MAX_BAD_WORDS",
    "MAX_CHOICES",
    "MAX_LOGPROB_TOKEN_IDS",
    "MAX_SEED",
    "MAX_STOP_STRINGS",
    "STRUCTURED_KINDS",
    "CompletionOutput",
    "Logprob",
    "OutputError",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "Retention",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokenIds",
    "TokensPrompt",
    "pack_ids",
    "unpack_ids",
]
