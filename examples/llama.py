"""LoRA on a Llama, in a plain training loop: python examples/llama.py

The Llama is tiny and random, so that nothing is downloaded. For a real one, replace the two lines
that build it with AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32).
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minilora

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_attention_heads=4, **shape))

config = minilora.LoRAConfig(rank=8, alpha=32, targets="all-linear", task_type="CAUSAL_LM")
print(minilora.inject(model, config))  # in place: freezes the model, wraps every target
optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-2)

tokens = torch.arange(32).remainder(8).repeat(4, 1)  # (batch, length): 0 1 ... 7 0 1 ...
losses = []
for _ in range(60):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

minilora.save_adapter(model, "llama-adapter")  # PEFT loads it
with minilora.disabled(model):  # the base model, without a copy of it
    print(f"loss of the base {model(input_ids=tokens, labels=tokens).loss.item():.2f}")
model = minilora.unwrap(model)  # merged: plain Linear modules again
print(f"loss when merged {model(input_ids=tokens, labels=tokens).loss.item():.2f}")
