"""A server on loopback that answers like vLLM's, over the toy model, and misbehaves on request."""

# K = log-probabilities asked for, V = vocabulary

import asyncio
import math
import threading

import numpy as np
from aiohttp import web
from fake_engine import FakeEngine

from lightopd.schemas.configs import SamplingConfig


class FakeServer:
    """Runs in a thread until `stop`.

    Args:
        engine: the toy model behind it.
        tokenizer: what `/tokenize` uses.
        root: where it says its model lies.
        parent: base model, where it says that it serves an adapter.
        max_model_len: what it says its limit is; left out, one more than the model's context.
        max_logprobs: most log-probabilities given; more are refused.
        clip_logprobs: gives fewer than asked for, without a word.
        processed: reports log-probabilities after temperature and truncation.
        broken_logprobs: reports others than those of the model, after whatever.
        tokenises_anew: changes the prompt's ids.
        ignores_stop: does not look for texts that end a response.
        stops_late: tokens that it returns behind such a text.
        max_tokens: most tokens of a response, whatever is asked for.
        odd_replica: nats that every third answer is off in scoring, as from a replica with other weights.
        statuses: of the first completions, before any is answered.
        api_key: asked for in every request.
        version: of vLLM.
        served: names of the models that it lists.
        padding: spaces in that list.
    """

    def __init__(self, engine, tokenizer, **options):
        self.engine, self.tokenizer = engine, tokenizer
        self.options = options
        self.statuses = list(options.get("statuses", ()))
        self.seen_headers, self.bodies = [], []
        self.most_at_once = self._at_once = self._scored = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def stop(self):
        """Close the port and end the thread."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _start(self):
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/completions", self._completions),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    def _refused(self, request):
        self.seen_headers.append(dict(request.headers))
        key = self.options.get("api_key")
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        return None

    async def _version(self, request):
        return self._refused(request) or web.json_response({"version": self.options.get("version", "0.32.0")})

    async def _models(self, request):
        cards = [self._card(name) for name in self.options.get("served", ["toy"])]
        padding = " " * self.options.get("padding", 0)
        return self._refused(request) or web.json_response({"data": cards, "padding": padding})

    def _card(self, name):
        return {
            "id": name,
            "root": self.options.get("root", "somewhere/else"),
            "parent": self.options.get("parent"),
            "max_model_len": self.options.get("max_model_len", self.engine.context_length + 1),
        }

    async def _tokenize(self, request):
        body = await request.json()
        return web.json_response(
            {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}
        )

    async def _completions(self, request):
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(0.001)
            return self._answer(request, await request.json())
        finally:
            self._at_once -= 1

    def _answer(self, request, body):
        if refused := self._refused(request):
            return refused
        if self.statuses:
            return web.json_response({"error": {"message": "busy"}}, status=self.statuses.pop(0))
        most = self.options.get("max_logprobs", math.inf)
        if (body.get("prompt_logprobs") or 0) > most:
            text = f"Requested prompt logprobs are more than the max allowed: {most}"
            return web.json_response({"error": {"message": text}}, status=400)
        self.bodies.append(body)
        ids = np.array(body["prompt"], dtype=np.int32)
        if self.options.get("tokenises_anew"):
            ids = ids[::-1]
        return web.json_response({"choices": [self._choice(ids, body)]})

    def _choice(self, ids, body):
        sampling = SamplingConfig(
            max_tokens=min(body["max_tokens"], self.options.get("max_tokens", body["max_tokens"])),
            temperature=0.0 if body.get("top_k") == 1 else body["temperature"],
            top_p=body.get("top_p", 1.0),
            seed=body.get("seed", 0),
        )
        stops = frozenset(body.get("stop_token_ids", ()))
        engine = FakeEngine.__new__(FakeEngine)
        engine.__dict__ = {
            **self.engine.__dict__,
            "context_length": self.engine.context_length + 1,
            "num_calls": 1,
        }
        sample = engine._draw(ids, sampling, "", stops)
        logprobs = sample.behavior_logprobs if self.options.get("processed") else sample.logprobs
        if self.options.get("broken_logprobs"):
            logprobs = logprobs - 3
        drawn, finish_reason, stop_reason = self._stopped(sample, body)
        logprobs = logprobs[: len(drawn)]
        choice = {
            "prompt_token_ids": ids.tolist(),
            "token_ids": drawn,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "logprobs": {"token_logprobs": [float(value) for value in logprobs]},
        }
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(ids, body["prompt_logprobs"])
        return choice

    def _stopped(self, sample, body):
        """Ids up to the first that completes a text of `stop`, unless told to look past them."""
        ids = sample.response_ids.tolist()
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end])
            for string in body.get("stop", ()):
                if string in text and not self.options.get("ignores_stop"):
                    late = self.options.get("stops_late", 0)
                    return ids[: end + late], "stop", string
        return ids, sample.finish_reason, None

    def _prompt_logprobs(self, ids, top_k):
        top_k = min(top_k, self.options.get("clip_logprobs", top_k))
        rows = [None]
        self._scored += 1
        off = self.options.get("odd_replica", 0.0) if self._scored % 3 == 0 else 0.0
        for end in range(1, len(ids)):
            logits_V = self.engine.logits(ids[:end])
            logprobs_V = logits_V - logits_V.max()
            logprobs_V = (logprobs_V - np.log(np.exp(logprobs_V).sum())).astype(np.float32)
            order = np.argsort(-logprobs_V, kind="stable")
            shown = dict.fromkeys([int(ids[end]), *order[:top_k].tolist()])
            rank_V = np.argsort(order)
            rows.append(
                {str(t): {"logprob": float(logprobs_V[t]) - off, "rank": int(rank_V[t]) + 1} for t in shown}
            )
        return rows
