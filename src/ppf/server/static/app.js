// The page: a slider whose moves are answered at once, and what the server says of the model that runs. It follows the study:
// every answer names the fit that it is of, and where that is another one all is asked anew.

import { Refused, askJson, forgetToken, keepToken, recallToken, tryToken } from "/static/api.js";
import { Bars, element } from "/static/bars.js";
import { Chart } from "/static/chart.js";
import { Writer } from "/static/generate.js";

const get = (id) => document.getElementById(id);
const CURVE_STEPS = 26;
const POLL_MS = { live: 1000, decisions: 3000 };
const USUAL_RATIO = 0.3;

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const count = (value) => Math.round(value).toLocaleString("en");

function bytes(value) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => value >= size) || [1, "B"];
  return `${(value / unit).toFixed(unit === 1 ? 0 : 2)} ${name}`;
}

function complain(error) {
  get("alert").textContent = error ? error.message : "";
  get("alert").hidden = !error;
}

/** Tiles by name; made once, then only their texts change. */
class Tiles {
  constructor(place) {
    this.place = place;
    this.values = new Map();
  }

  set(name, value, more) {
    if (!this.values.has(name)) {
      const [box, dd] = [element("div"), element("dd")];
      const [main, small] = [element("span"), element("small")];
      dd.append(main, small);
      box.append(element("dt", "", name), dd);
      this.place.append(box);
      this.values.set(name, [main, small]);
    }
    const [main, small] = this.values.get(name);
    main.textContent = value;
    small.textContent = more;
  }
}

class Page {
  /** Shows a study, at first at a ratio; `running` is the live model's, or undefined. */
  constructor(study, ratio, running) {
    this.slider = get("ratio");
    this.tiles = new Tiles(get("tiles"));
    this.chart = new Chart(get("chart"));
    this.controlled = false;
    this.running = running;
    this.take(study);
    this.slider.value = String(ratio);
    this.slider.addEventListener("input", () => this.show());
    this.slider.addEventListener("change", () => this.follow());
    get("follow").addEventListener("change", () => this.follow());
    get("table-box").addEventListener("toggle", () => this.bars?.drawTable(this.shown.kept));
    new Writer(() => this.ratio);
  }

  /** Takes a fit into use. The slider stays where it is as long as that is a place of it. */
  take(study) {
    Object.assign(this, { study, policies: new Map(), bars: null });
    this.reach();
    this.describe();
  }

  /** Lets slider and chart go as far as the agent was trained, and as far as any ratio where the live model runs beyond that. */
  reach() {
    const { study } = this;
    delete document.body.dataset.ready;
    const { max, floor } = study.ratios;
    const most = this.running > max ? floor : Math.min(max, floor);
    this.most = most;
    this.slider.max = String(Math.floor(most * 200 + 1e-6) / 200);
    const measured = study.points.filter((point) => point.kind !== "probe");
    this.chart.take(measured, study.dense.log_ppl, most);
  }

  /** Another fit is served: asks for it, once however many answers say so. */
  renew() {
    this.renewing ||= askJson("/api/study").then((study) => {
      this.take(study);
      get("news").textContent = `The study was fitted anew; since ${new Date().toLocaleTimeString()} all of this is of the new fit.`;
      get("news").hidden = false;
      this.start().catch(complain);
    }).finally(() => { this.renewing = null; });
    return this.renewing;
  }

  get ratio() {
    return Number(this.slider.value);
  }

  describe() {
    const { model, predictor, protocol, dense, live } = this.study;
    document.title = `${model.name}: ppf`;
    get("title").textContent = model.name;
    get("lead").textContent = `${model.type}, ${model.layers} layers, ${count(model.params)} parameters, ${percent(model.prunable / model.params)} of them prunable.`;
    const tau = predictor.heldout?.tau_mean;
    get("chart-lead").textContent = `On ${count(protocol.tokens)} tokens of ${protocol.text}; dense perplexity ${dense.ppl.toFixed(2)}.` + (tau === undefined ? "" : ` The predictor orders masks of one size with Kendall's tau ${tau.toFixed(2)}.`);
    get("foot").textContent = live ? "A live model answers at /v1, in the words of OpenAI's clients." : "Decisions alone: this server runs no model.";
    for (const id of ["write", "state", "follow-row"]) get(id).hidden = !live;
  }

  /** Draws a fit and asks for every place of the slider in advance, so that its moves are answered from here. */
  async start() {
    const drawing = Symbol("of this call");
    this.drawing = drawing;
    const current = () => this.drawing === drawing;
    const [step, most] = [Number(this.slider.step), Number(this.slider.max)];
    try {
      await this.policy(this.ratio);
      get("main").hidden = false;
      this.show();
      const curve = [];
      for (let place = 0; place <= CURVE_STEPS && current(); place += 1) {
        const { ratio, predicted } = await this.policy(Math.round((most * place * 200) / CURVE_STEPS) / 200);
        curve.push({ ratio: ratio.met, ...predicted });
      }
      if (current()) this.chart.setCurve(curve);
      for (let place = 0; place * step <= most + 1e-9 && current(); place += 1) await this.policy(place * step);
    } catch (error) {
      if (current()) throw error; // else it was of a fit that is served no more, or drawn once more
    }
    if (current()) document.body.dataset.ready = "all";
  }

  /** The decision at a ratio by the fit that is served, asked for once. */
  async policy(ratio) {
    const key = ratio.toFixed(4);
    while (!this.policies.has(key)) {
      const found = await askJson(`/api/policy?ratio=${key}`);
      if (found.fit === this.study.fit) this.policies.set(key, found);
      else await this.renew();
    }
    return this.policies.get(key);
  }

  /** Shows what the slider says; of many moves only the last is asked for. */
  async show() {
    const ratio = this.ratio;
    get("ratio-shown").textContent = percent(ratio);
    this.slider.setAttribute("aria-valuetext", percent(ratio));
    const known = this.policies.get(ratio.toFixed(4));
    if (known) return this.draw(known);
    if (this.asking) return;
    this.asking = true;
    try {
      this.draw(await this.policy(ratio));
      complain(null);
    } catch (error) {
      if (this.ratio === ratio) complain(error);
    } finally {
      this.asking = false;
    }
    if (this.ratio !== ratio) this.show();
  }

  draw(policy) {
    if (policy.fit !== this.study.fit) return;
    this.shown = policy;
    this.bars ||= new Bars(get("bars"), get("table"), policy.kept);
    const { predicted, params, ratio } = policy;
    const { dense, model } = this.study;
    this.bars.draw(policy.kept);
    this.chart.mark(ratio.met, predicted.log_ppl);
    get("beyond").hidden = policy.in_range;
    const spread = predicted.ppl * predicted.std;
    this.tiles.set("predicted perplexity", predicted.ppl.toFixed(2), `± ${spread.toFixed(2)}; dense ${dense.ppl.toFixed(2)}`);
    this.tiles.set("parameters", count(params.after), `${percent(1 - params.after / params.before)} of all gone`);
    this.tiles.set("file size", bytes(policy.memory), `dense ${bytes(params.before * model.bytes_per_param)}`);
    this.tiles.set("memory", bytes(policy.memory_in_use ?? policy.memory), policy.memory_in_use ? "weights in use, as they run" : "weights");
    this.tiles.set("KV cache", bytes(policy.kv_bytes_per_token), "a token");
    const speed = policy.tokens_per_second;
    if (speed) this.tiles.set("tokens/s", speed.toFixed(0), "one request, idle machine");
    get("decided").textContent = `Decided in ${policy.milliseconds.toFixed(1)} ms on the server.`;
  }

  /** Sets the live model to the slider; one request at a time, or an earlier one could be the last to arrive. */
  async follow() {
    if (!this.study.live || this.controlled || this.setting || !get("follow").checked) return;
    const ratio = this.ratio;
    this.setting = true;
    try {
      await askJson("/api/ratio", { ratio });
      complain(null);
      this.poll();
    } catch (error) {
      complain(error);
    } finally {
      this.setting = false;
    }
    if (this.ratio !== ratio) this.follow();
  }

  /** Asks what runs and of which fit, again and again while the page is seen, and at once when it is seen again. */
  watch() {
    const look = async () => {
      if (!document.hidden) await this.poll();
      setTimeout(look, this.study.live ? POLL_MS.live : POLL_MS.decisions);
    };
    document.addEventListener("visibilitychange", () => document.hidden || this.poll());
    look();
  }

  async poll() {
    try {
      const state = await askJson("/api/state");
      this.running = state.ratio;
      if (state.fit !== this.study.fit) await this.renew();
      if (state.live) this.drawState(state);
      const { max, floor } = this.study.ratios;
      if (this.running > max && this.most < floor) {
        this.reach();
        this.start().catch(complain);
      }
    } catch (error) {
      this.lost = true;
      complain(error);
      return;
    }
    if (this.lost) complain(null);
    this.lost = false;
  }

  drawState(state) {
    const { controller, memory, requests } = state;
    this.controlled = controller.on;
    const field = get("count");
    field.max = Math.min(state.max_tokens, Number(field.max));
    if (document.activeElement !== field && Number(field.value) > Number(field.max)) field.value = field.max; // else it is being typed
    get("follow-row").hidden = controller.on;
    const speed = state.latency_ms === null ? "idle" : `${state.tokens_per_second.toFixed(0)} tokens/s, ${state.latency_ms.toFixed(1)} ms a token`;
    const facts = {
      ratio: `${percent(state.met)}${state.nested ? ", nested" : ""}`,
      speed,
      memory: `${bytes(memory.weights)} of weights in use, ${bytes(memory.kv_cache)} of KV cache`,
      requests: `${requests.running} running, ${requests.waiting} waiting, ${requests.done} done`,
      controller: this.wordsOf(controller),
    };
    const nodes = Object.entries(facts).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]);
    get("facts").replaceChildren(...nodes);
    const decisions = (controller.decisions || []).slice(-5).reverse();
    get("decisions").replaceChildren(...decisions.map((one) => {
      const time = new Date(1e3 * one.time).toLocaleTimeString();
      return element("li", "", `${time}: ${percent(one.from)} to ${percent(one.to)}; ${one.reason}`);
    }));
  }

  wordsOf(controller) {
    if (!controller.on) return "off: the ratio is set by hand";
    const { latency_ms: latency, memory } = controller.target;
    const goals = [latency === null ? "" : `${latency} ms a token`, memory === null ? "" : bytes(memory)].filter(Boolean);
    const { min_ratio: low, max_ratio: high } = controller.limits;
    return `on: at most ${goals.join(" and ")}, between ${percent(low)} and ${percent(high)}`;
  }
}

/** Asks for a token, and says so where one was given in vain. */
function lock() {
  const field = get("token");
  const wrong = forgetToken();
  complain(wrong ? new Error("Wrong token: it must be the one that the server was started with.") : null);
  field.setAttribute("aria-invalid", String(wrong));
  get("token-form").hidden = false;
  get("lead").textContent = "Locked.";
  field.focus();
  field.select();
}

async function begin() {
  let study;
  let running;
  try {
    study = await askJson("/api/study");
    if (study.live) running = (await askJson("/api/state")).ratio;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) lock();
    else complain(error);
    return;
  }
  keepToken();
  get("token-form").hidden = true;
  complain(null);
  try {
    const page = new Page(study, running ?? USUAL_RATIO, running);
    page.watch();
    await page.start();
  } catch (error) {
    complain(error);
  }
}

get("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  complain(null); // the same words again are read out again
  tryToken(get("token").value.trim());
  begin();
});
recallToken();
begin();
