"""llama.cpp as the judge of what we write: log-probabilities, tokens and chat answers, through the xllamacpp wheel."""

import json
import urllib.request
from pathlib import Path

import torch
from torch import Tensor


class LlamaCpp:
    """A GGUF, with or without a GGUF LoRA, on one thread, all arithmetic in float32."""

    def __init__(self, model: Path, lora: Path | None = None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity, params.use_jinja, params.port = False, -1, True, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, ids: list[int], vocabulary: int, top: int | None = None) -> Tensor:
        """(S, V): of the next token behind every prefix of `ids`; -inf for all but the `top` likeliest."""
        rows = []
        for end in range(1, len(ids) + 1):
            request = {"prompt": ids[:end], "n_predict": 1, "n_probs": top or vocabulary, "temperature": 0.0}
            answer = self._server.handle_completions(request)
            found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            row = torch.full((vocabulary,), -torch.inf)
            row[torch.tensor([entry["id"] for entry in found])] = torch.tensor([entry["logprob"] for entry in found])
            rows.append(row)
        return torch.stack(rows)

    def complete(self, ids: list[int], tokens: int) -> str:
        """Greedy continuation as text."""
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0.0}
        return self._server.handle_completions(request)["choices"][0]["text"]

    def chat(self, question: str, *, thinking: bool = False, tokens: int = 32) -> str:
        """The answer of the chat endpoint, greedy."""
        request = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0.0,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        return self._server.handle_chat_completions(request)["choices"][0]["message"]["content"]

    def tokenize(self, text: str) -> list[int]:
        """Token ids, markers of turns taken as what they are."""
        return self._post("/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def render(self, messages: list[dict], *, thinking: bool) -> str:
        """The chat template applied."""
        content = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        return self._post("/apply-template", content)["prompt"]

    def _post(self, path: str, content: dict) -> dict:
        address = self._server.listening_address
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, json.dumps(content).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=20) as answer:
            return json.loads(answer.read())
