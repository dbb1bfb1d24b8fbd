"""Models that RayLLM has no decoder for, computed by their class in `transformers` with RayLLM's attention.

spec        config.json -> DecoderSpec, or why the model cannot be served
attention   the attention and the mask that `transformers` calls, over the paged KV cache
parallel    what replaces linear layers and embeddings, by the words of a tensor-parallel plan
names       which tensors of a checkpoint make each parameter, by the conversions of `transformers`
build       the model: made without memory, its layers replaced, a rank's share of the weights read
decoder     the interface of `models.decoder.Decoder`
"""
