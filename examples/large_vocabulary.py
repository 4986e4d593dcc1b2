"""Makes the head of a large vocabulary several times faster on a CPU, for the same numbers."""

import trl.trainer.utils
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob


LARGE = 10_000  # tokens; with fewer, there is nothing to gain
TOKENS, COLUMNS = 512, 1024  # of a tile


def speed_up_head(model: PreTrainedModel) -> None:
    """Fit the head to a CPU's caches, in training for the whole process, and in sampling for this model.

    TRL computes log-probabilities in tiles of the logits that are made for a GPU, 4,096 tokens by 32,768. Smaller ones
    stay in the cache. And a head that is not trained, as with LoRA, is copied by torch for every row of a batch if its
    input is strided, as that of the last position of each prompt is.
    """
    if model.device.type != "cpu" or model.config.vocab_size < LARGE:
        return
    chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = TOKENS, COLUMNS
    model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
