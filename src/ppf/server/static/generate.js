// Text from the dense and the pruned model, one after the other, so that neither slows the other down.

import { askJson, events } from "/static/api.js";

const get = (id) => document.getElementById(id);

export class Writer {
  constructor(ratio) {
    this.ratio = ratio;
    get("write-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    get("stop").addEventListener("click", () => this.stopping?.abort());
  }

  async run() {
    if (this.stopping) return;
    this.stopping = new AbortController();
    this.busy(true);
    const ratio = this.ratio();
    const sides = [["dense", 0, "Dense"], ["pruned", ratio, `Pruned, ${(100 * ratio).toFixed(1)} % gone`]];
    for (const [side, , name] of sides) {
      get(`${side}-head`).textContent = name;
      get(`${side}-text`).textContent = "";
    }
    try {
      this.model ??= (await askJson("/v1/models")).data[0].id;
      for (const side of sides) await this.write(...side);
      get("write-state").textContent = "Done.";
    } catch (error) {
      get("write-state").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      this.stopping = null;
      this.busy(false);
    }
  }

  async write(side, ratio, name) {
    const [head, text] = [get(`${side}-head`), get(`${side}-text`)];
    get("write-state").textContent = `${name} writes ...`;
    const body = {
      model: this.model, prompt: get("prompt").value, max_tokens: Number(get("count").value), stream: true, seed: 0,
      temperature: Number(get("manner").value), prune_ratio: ratio, stream_options: { include_usage: true },
    };
    let first = 0;
    for await (const record of events("/v1/completions", body, this.stopping.signal)) {
      const piece = record.choices[0]?.text;
      if (piece) {
        first ||= performance.now();
        text.append(piece);
      }
      const made = record.usage?.completion_tokens;
      if (made > 8) head.textContent = `${name}: ${((1e3 * (made - 1)) / (performance.now() - first)).toFixed(0)} tokens/s`;
    }
  }

  /** Of the two buttons one can be pressed; whoever stood at the other is led to it, for a disabled one loses the focus. */
  busy(is) {
    const [from, to] = is ? [get("go"), get("stop")] : [get("stop"), get("go")];
    to.disabled = false;
    if (document.activeElement === from) to.focus();
    from.disabled = true;
  }
}
