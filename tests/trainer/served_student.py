"""A server that holds a model in this process, writes greedily with it, and takes new weights as vLLM does."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.sources.writing_server import WritingServer


class StudentServer(WritingServer):
    """`deaf`: says that weights are loaded, and goes on with the old ones; `lives`: answers that it gives before it dies."""

    def __init__(self, base: Path, deaf: bool = False, lives: int | None = None) -> None:
        super().__init__(model="student", longest=128)
        self.base, self.deaf, self.lives = base, deaf, lives
        self.held: dict[str, Any] = {"student": AutoModelForCausalLM.from_pretrained(base)}

    def administer(self, path: str, body: Any) -> tuple[int, Any]:
        found = super().administer(path, body)
        fresh = AutoModelForCausalLM.from_pretrained(self.base)
        if found[0] == 200 and path == "/v1/load_lora_adapter":
            self.held[body["lora_name"]] = fresh if self.deaf else PeftModel.from_pretrained(fresh, body["lora_path"])
        if found[0] == 200 and path == "/collective_rpc" and not self.deaf:
            self.held["student"] = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
        return found

    def good(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.lives is not None and len(self.asked) > self.lives:
            raise ConnectionError
        if "prompt_logprobs" in body:
            return self.judged(body)
        ids = self.continued(body)
        choice = {"index": 0, "text": "x", "token_ids": ids, "prompt_token_ids": body["prompt"]}
        choice["finish_reason"] = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {"id": f"cmpl-{body['request_id']}", "model": body["model"], "choices": [choice]}

    @torch.no_grad()
    def continued(self, body: dict[str, Any]) -> list[int]:
        ids: list[int] = []
        model = self.held[body["model"]].eval()
        while len(ids) < body["max_tokens"] and ids[-1:] != [1]:
            logits = model(input_ids=torch.tensor([body["prompt"] + ids])).logits[0, -1]
            for token, bias in body.get("logit_bias", {}).items():
                logits[int(token)] += bias
            ids.append(int(logits.argmax()))
        return ids

    @torch.no_grad()
    def judged(self, body: dict[str, Any]) -> dict[str, Any]:
        found = super().judged(body)
        (ids,) = body["prompt"]
        own = self.held[body["model"]].eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, entry in enumerate(found["choices"][0]["prompt_logprobs"]):
            for token, said in (entry or {}).items():
                said["logprob"] = float(own[place - 1, int(token)])
        return found
