"""LoRA with Hugging Face's Trainer: python examples/trainer.py

The Trainer trains every parameter that requires a gradient. After `inject` these are A and B.
It needs one more package: pip install accelerate. The BART is tiny and random, so that nothing is
downloaded.
"""

import torch
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments

import minilora


class AdapterTrainer(Trainer):
    """Checkpoints hold the adapter only: save_pretrained writes it, and load_adapter reads it."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        minilora.load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self):  # with load_best_model_at_end
        minilora.load_adapter(self.model, self.state.best_model_checkpoint)


torch.manual_seed(0)
shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
model = BartForConditionalGeneration(BartConfig(vocab_size=100, **shape, **heads))
config = minilora.LoRAConfig(rank=8, alpha=32, targets="all-linear", task_type="SEQ_2_SEQ_LM")
print(minilora.inject(model, config))

rows = torch.randint(4, 12, (64, 12))  # (examples, length)
dataset = [{"input_ids": row, "labels": row[:6]} for row in rows]  # copy the first six tokens
settings = {"learning_rate": 1e-2, "logging_steps": 8, "save_steps": 40}
quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
arguments = TrainingArguments("trainer-output", num_train_epochs=10, **settings, **quiet)
trainer = AdapterTrainer(model, arguments, train_dataset=dataset)
trainer.train()  # after a stop: trainer.train(resume_from_checkpoint=True)

minilora.save_adapter(model, "trainer-adapter")  # PEFT loads it
