"""llama.cpp's own sampler chain."""

from __future__ import annotations

from tuoling.infer.llamacpp import LlamaModel, llama_library


class Sampler:
    """temperature, then top_k, then top_p, then a draw: the order of transformers."""

    def __init__(self, *, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        self._c = llama_library()
        params = self._c.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = self._c.llama_sampler_chain_init(params)
        self._c.llama_sampler_chain_add(self._chain, self._c.llama_sampler_init_temp(temperature))
        if top_k > 0:
            self._c.llama_sampler_chain_add(self._chain, self._c.llama_sampler_init_top_k(top_k))
        if top_p < 1.0:
            self._c.llama_sampler_chain_add(self._chain, self._c.llama_sampler_init_top_p(top_p, 1))
        self._c.llama_sampler_chain_add(self._chain, self._c.llama_sampler_init_dist(seed))

    def draw(self, model: LlamaModel) -> int:
        """A token of the distribution that the model's last logits become."""
        return int(self._c.llama_sampler_sample(self._chain, model.context, -1))

    def close(self) -> None:
        """Free the chain."""
        self._c.llama_sampler_free(self._chain)
