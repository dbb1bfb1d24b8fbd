// What went wrong, by kind and by when: counters that grew, and histograms that took something.

const KEEP_S = 3600;

/** Errors as events, from how counters grow while the page looks. */
export class Errors {
  #totals = null; // kind -> total, as last seen
  #events = []; // {at, kind, group, by}

  constructor(history) {
    this.history = history;
  }

  /** Looks at the newest figures; `at` is in seconds. */
  note(at) {
    const now = this.#read();
    for (const { kind, group, total } of this.#totals ? now : []) {
      const before = this.#totals.get(kind) ?? 0;
      const by = total < before ? total : total - before; // a process that was replaced counts from 0
      if (by > 0) this.#events.push({ at, kind, group, by });
    }
    this.#totals = new Map(now.map(({ kind, total }) => [kind, total]));
    while (this.#events.length && this.#events[0].at < at - KEEP_S) this.#events.shift();
  }

  #read() {
    const of = (group, name, label, words) => this.history.byLabel(name, label).map(([value, total]) => ({ kind: words(value), group, total }));
    const restarts = this.history.value("rayllm:driver_restarts_total") ?? 0;
    return [
      ...of("refused", "rayllm:requests_refused_total", "code", (code) => `refused: ${code}`),
      ...of("failed", "vllm:request_success_total", "finished_reason", (reason) => (reason === "error" ? "answer failed" : "")).filter(({ kind }) => kind),
      ...of("faults", "rayllm:worker_faults_total", "kind", (kind) => `worker ${kind}`),
      ...(restarts ? [{ kind: "driver replaced", group: "faults", total: restarts }] : []),
    ];
  }

  /** How many of each group: refused, failed, faults. */
  inLast(seconds, at) {
    const recent = this.#events.filter((event) => event.at > at - seconds);
    return ["refused", "failed", "faults"].map((group) => recent.filter((event) => event.group === group).reduce((sum, { by }) => sum + by, 0));
  }

  /** `{kind, num, total}`: in the last seconds and in all, those of now first; beyond `max_kinds` in one row. */
  byKind(seconds, at, max_kinds) {
    const rows = this.#read().map(({ kind, total }) => {
      const recent = this.#events.filter((event) => event.kind === kind && event.at > at - seconds);
      return { kind, total, num: recent.reduce((sum, { by }) => sum + by, 0) };
    });
    rows.sort((a, b) => b.num - a.num || b.total - a.total);
    if (rows.length <= max_kinds) return rows;
    const others = rows.splice(max_kinds - 1);
    const sum = (name) => others.reduce((before, row) => before + row[name], 0);
    return [...rows, { kind: `${others.length} other kinds`, num: sum("num"), total: sum("total") }];
  }
}

/** Gaps after faults, one by one. */
export class FaultGaps {
  #before = null;

  constructor(history) {
    this.history = history;
  }

  /** The mean gap and detection time of the faults since it was last asked, in seconds; null for each where none was. */
  next() {
    const now = ["rayllm:fault_gap_seconds", "rayllm:fault_detection_seconds"].map((name) => ({
      sum: this.history.value(`${name}_sum`) ?? 0,
      count: this.history.value(`${name}_count`) ?? 0,
    }));
    const before = this.#before ?? now;
    this.#before = now;
    return now.map(({ sum, count }, i) => (count > before[i].count ? (sum - before[i].sum) / (count - before[i].count) : null));
  }
}
