"""DistilBERT base: 6 layers of 768, 67 M parameters with the masked-word head, taught by BERT base.

Loss 5 x KL at temperature 2 + 2 x masked words + 1 x cosine of the last hidden states; the layers
start as layers 0, 2, 4, 7, 9 and 11 of the teacher; no segments, no pooler, no sentence objective;
AdamW with corrected moments, no weight decay, clipping at 5 (Sanh et al. 2019, arXiv:1910.01108;
huggingface/transformers, its research project distillation). Departures: masks are drawn evenly,
where the published recipe prefers rare pieces, and KL is taken over the masked pieces alone (its
option `restrict_ce_to_mask`), where the published default is every piece.

--config=configs/distilbert_base.py --config.distillation.teacher=runs/bert_base
Without a teacher the same student trains on masked words alone, from fresh values.
"""

import bert_base
import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    c = bert_base.published()
    c.model.model_type = "distilbert"
    c.model.num_hidden_layers = 6
    c.model.num_hidden_groups = 6
    c.model.type_vocab_size = 0
    c.model.pooler = False
    c.model.sentence_objective = "none"
    # Three passes over BERT's 3.3 billion words, at about 400 words a sequence.
    c.train.steps = 12_000
    c.train.global_batch_size = 2000  # 5 sequences, 50 times, on 8 devices
    c.train.microbatch_size = 25
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 600  # 5 %
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 5.0
    c.optimizer.bias_correction = True
    c.optimizer.decay_from_warmup = True
    c.distillation.student_layers = "0,2,4,7,9,11"
    return c
