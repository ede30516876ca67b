// Asking the server: JSON in and out, its token, and streams of events.

let token = "";

/** An answer that is no success: `status`, and the server's own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Takes the token from `#token=...`, which leaves the address bar, or from earlier in this tab. */
export function recallToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    history.replaceState(null, "", location.pathname);
    keepToken(given);
  } else {
    token = sessionStorage.getItem("ppf-token") || "";
  }
}

export function keepToken(value) {
  token = value;
  sessionStorage.setItem("ppf-token", value);
}

/** Asks; a body makes it a POST. */
export async function ask(path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server must answer; it does not; is it still running?");
  }
  if (response.ok) return response;
  const record = await response.json().catch(() => ({}));
  throw new Refused(response.status, record.error?.message || `the server answered ${response.status}`);
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
      if (record.error) throw new Refused(500, record.error.message);
      yield record;
    }
  }
}
