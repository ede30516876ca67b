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
    const asked = {  // once, so that both sides answer the same whatever is typed meanwhile
      prompt: get("prompt").value, max_tokens: Number(get("count").value), stream: true, seed: 0,
      temperature: Number(get("manner").value), stream_options: { include_usage: true },
    };
    const sides = [["dense", 0, "Dense"], ["pruned", ratio, `Pruned, ${(100 * ratio).toFixed(1)} % gone`]];
    for (const [side, , name] of sides) {
      get(`${side}-head`).textContent = name;
      get(`${side}-text`).textContent = "";
    }
    try {
      this.model ??= (await askJson("/v1/models")).data[0].id;
      const refusals = [];
      for (const side of sides) refusals.push(await this.tryWrite(asked, ...side));
      get("write-state").textContent = refusals.every(Boolean) ? refusals[1] : "Done.";
    } catch (error) {
      get("write-state").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      this.stopping = null;
      this.busy(false);
    }
  }

  /** Writes one side; where a goal of memory has no room for it, that is said there, and the other side goes on. */
  async tryWrite(asked, side, ratio, name) {
    try {
      await this.write(asked, side, ratio, name);
      return "";
    } catch (error) {
      if (error.code !== "no_memory") throw error;
      get(`${side}-head`).textContent = `${name}: no room under the goal of memory`;
      return error.message;
    }
  }

  async write(asked, side, ratio, name) {
    const [head, text] = [get(`${side}-head`), get(`${side}-text`)];
    get("write-state").textContent = `${name} writes ...`;
    const body = { ...asked, model: this.model, prune_ratio: ratio };
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
