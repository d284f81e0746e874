"""LoRA with Hugging Face's Trainer: python examples/trainer.py

The Trainer trains every parameter that requires a gradient. After `inject` these are A and B.
The BART is tiny and random, so that nothing is downloaded.
"""

import torch
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments

import minilora

torch.manual_seed(0)
shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
model = BartForConditionalGeneration(BartConfig(vocab_size=100, **shape, **heads))
config = minilora.LoRAConfig(rank=8, alpha=32, targets="all-linear", task_type="SEQ_2_SEQ_LM")
print(minilora.inject(model, config))

rows = torch.randint(4, 12, (64, 12))  # (examples, length)
dataset = [{"input_ids": row, "labels": row[:6]} for row in rows]  # copy the first six tokens
arguments = TrainingArguments(
    output_dir="trainer-output",
    num_train_epochs=10,
    learning_rate=1e-2,
    logging_steps=8,
    save_strategy="no",  # save_adapter writes the adapter alone
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
trainer.train()

minilora.save_adapter(model, "trainer-adapter")  # PEFT loads it
