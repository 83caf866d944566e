"""The contract, packing: documents in one row are the documents alone."""

from itertools import product

import pytest
import torch
from contract import (
    assert_equal_gradients,
    assert_equal_to_rounding,
    every_config,
    gradients,
    in_calls,
    weights_like,
)
from families import CONFIGS, PRESETS, ids, logits, tiny_model
from transformers import DataCollatorWithFlattening

LENGTHS = [1, 2, 5, 17, 64, 65, 70]  # shorter than any convolution, shorter and longer than a chunk
PACKED_FORMS = {
    "position_ids": {"position_ids"},
    "cu_seq_lens_q": {"cu_seq_lens_q"},
    "all_the_collator_has": {
        *("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    },
}


@pytest.mark.parametrize("name, form", [*product(CONFIGS, PACKED_FORMS), *product(PRESETS, ["position_ids"])])
def test_packing(name, form):
    """Documents in one row have the logits, the loss and the gradients that they have alone.

    The row is longer than the filters of Hyena, as rows of documents are: 224 tokens to 128.
    """
    model, names = tiny_model(name, max_position_embeddings=128), PACKED_FORMS[form]
    documents = [ids(n, seed=n).tolist() for n in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    row = collate([{"input_ids": document} for document in documents])
    assert row["input_ids"].shape == (1, sum(LENGTHS)) and names <= set(row)
    row = {key: value for key, value in row.items() if key in names | {"input_ids", "labels"}}
    labels = int((row["labels"][:, 1:] != -100).sum())
    assert labels == sum(LENGTHS) - len(LENGTHS)

    packed = model(**row)
    weights = weights_like(packed.logits).split(LENGTHS, dim=1)
    objective, loss, alone = 0.0, 0.0, []
    for document, w in zip(documents, weights, strict=True):
        x = torch.tensor([document])
        output = model(x, labels=x, num_items_in_batch=labels)
        alone.append(output.logits)
        loss = loss + output.loss
        objective = objective + (w * output.logits).sum()
    assert_equal_to_rounding(packed.logits, torch.cat(alone, 1))
    assert_equal_gradients(gradients(model, (torch.cat(weights, 1) * packed.logits).sum()), gradients(model, objective))
    # Transformers takes its losses in float32: 200 tokens of which each rounds at 6e-8.
    torch.testing.assert_close(packed.loss, loss, rtol=1e-5, atol=0)


@every_config
def test_packed_documents_of_one_token(name):
    model, x = tiny_model(name), ids(1, 9)
    alone = torch.cat([logits(model, token) for token in x.split(1, dim=1)], 1)
    assert_equal_to_rounding(logits(model, x, position_ids=torch.zeros(1, 9, dtype=torch.long)), alone)
    assert_equal_to_rounding(logits(model, x, cu_seq_lens_q=torch.arange(10)), alone)


@every_config
def test_one_document_is_not_packed(name):
    """Positions that only count, from whatever number, are one document, also in a batch and with a cache."""
    model, x = tiny_model(name), ids(2, 21)
    expected, positions = logits(model, x), torch.arange(21).expand(2, -1)
    assert_equal_to_rounding(logits(model, x, position_ids=positions), expected)
    assert_equal_to_rounding(logits(model, x, position_ids=positions[:1]), expected)
    assert_equal_to_rounding(logits(model, x[:1], cu_seq_lens_q=torch.tensor([0, 21])), expected[:1])
    _, cache = in_calls(model, x[:, :13], [13])
    with torch.no_grad():
        rest = model(x[:, 13:], position_ids=positions[:, 13:], past_key_values=cache).logits
    assert_equal_to_rounding(rest, expected[:, 13:])
