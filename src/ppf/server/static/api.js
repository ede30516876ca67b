// Asking the server: JSON in and out, its token, and streams of events.

let token = "";

/** An answer that is no success: `status`, the server's own words, and its word for programs. */
export class Refused extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Takes the token from `#token=...`, which leaves the address bar, or from earlier in this tab. */
export function recallToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname);
  token = given || sessionStorage.getItem("ppf-token") || "";
}

/** Sends a token from now on; it is kept for this tab once the server took it. */
export function tryToken(value) {
  token = value;
}

/** Keeps the token, which the server took. */
export function keepToken() {
  if (token) sessionStorage.setItem("ppf-token", token);
}

/** Forgets the token, which the server did not take; whether there was one. */
export function forgetToken() {
  const had = token !== "";
  token = "";
  sessionStorage.removeItem("ppf-token");
  return had;
}

/** The headers of a request; what no header can hold is no server's token. */
function headersOf(body) {
  const headers = new Headers(body === undefined ? {} : { "Content-Type": "application/json" });
  try {
    if (token) headers.set("Authorization", `Bearer ${token}`);
  } catch {
    throw new Refused(401, "the token must be the server's; no header can hold this one");
  }
  return headers;
}

/** Asks; a body makes it a POST. */
export async function ask(path, body, signal) {
  const options = { headers: headersOf(body), signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server must answer; it does not; is it still running?");
  }
  if (response.ok) return response;
  const record = await response.json().catch(() => ({}));
  throw new Refused(response.status, record.error?.message || `the server answered ${response.status}`, record.error?.code);
}

export async function askJson(path, body) {
  return (await ask(path, body)).json();
}

/** The records of a stream of events, one by one. */
export async function* events(path, body, signal) {
  const reader = (await ask(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const record = JSON.parse(data);
      if (record.error) throw new Refused(500, record.error.message, record.error.code);
      yield record;
    }
  }
}
