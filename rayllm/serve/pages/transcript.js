// The turns of the conversation that is shown, and where its reader is in them.

import { AnswerView } from "./answer.js";
import { nextToLeaveOut, shownAnswer } from "./conversation.js";
import { byId, copyButton, h, iconButton } from "./dom.js";

const NEAR_END_PX = 48;
const RENDER_SHARE = 5; // of the time, at most one part in so many goes into showing text

/** `actions` are what the buttons of a turn do; `runOf(answer)` is its run, or null. */
export class Transcript {
  #views = new Map(); // answer -> AnswerView
  #dirty = new Set();
  #isScheduled = false;
  #readyAt = 0;
  #follows = true;
  #lastTop = 0;

  constructor(actions, runOf) {
    this.actions = actions;
    this.runOf = runOf;
    this.root = byId("turns");
    this.scroller = byId("scroller");
    this.jump = byId("jump");
    this.scroller.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    this.jump.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#keepPlace()).observe(this.root);
    new ResizeObserver(() => this.#keepPlace()).observe(this.scroller);
  }

  /** Shows a conversation from the beginning, at its end. */
  show(conversation) {
    this.conversation = conversation;
    this.#views.clear();
    this.root.replaceChildren(...conversation.turns.map((turn) => this.#turnNode(turn)));
    this.root.classList.toggle("compared", conversation.lanes.length > 1);
    this.follow();
  }

  /** Shows anew what was changed but for text that grew: turns that came, went or changed. */
  refresh() {
    const { scrollTop } = this.scroller;
    const follows = this.#follows;
    this.show(this.conversation);
    if (!follows) this.scroller.scrollTop = scrollTop;
  }

  append(turn) {
    const before = this.root.lastElementChild;
    if (before) before.replaceWith(this.#turnNode(this.conversation.turns.at(-2)));
    this.root.append(this.#turnNode(turn));
    this.follow();
  }

  replace(turn) {
    this.root.querySelector(`[data-turn="${turn.id}"]`)?.replaceWith(this.#turnNode(turn));
  }

  /** The answer grew: it is shown with the next frame, or later where showing takes long. */
  touch(answer) {
    if (!this.#views.has(answer)) return;
    this.#dirty.add(answer);
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    const wait = this.#readyAt - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(() => this.#showDirty()), wait);
    else requestAnimationFrame(() => this.#showDirty());
  }

  follow() {
    this.#follows = true;
    this.#keepPlace();
  }

  /** Opens the editor of a user's turn. */
  edit(turn) {
    const node = this.root.querySelector(`[data-turn="${turn.id}"] .question`);
    node?.replaceWith(this.#editor(turn));
    this.root.querySelector(".editor textarea")?.focus();
  }

  #showDirty() {
    this.#isScheduled = false;
    const start = performance.now();
    for (const answer of this.#dirty) this.#updateAnswer(answer);
    this.#dirty.clear();
    this.#keepPlace();
    this.#readyAt = performance.now() + (performance.now() - start) * RENDER_SHARE;
  }

  #updateAnswer(answer) {
    const found = this.#views.get(answer);
    if (!found) return;
    const { view, turn, lane } = found;
    const { turns, lanes } = this.conversation;
    view.update(answer, {
      run: this.runOf(answer),
      variants: { number: turn.shown[lane] + 1, count: turn.answers[lane].length },
      canTell: lanes.length === 1 && turns.at(-1) === turn,
    });
  }

  #turnNode(turn) {
    const question = turn.kind === "user" ? this.#question(turn) : this.#results(turn);
    const answers = this.conversation.lanes.map((_, lane) => this.#answerNode(turn, lane));
    const border = turn.beginsSent && h("p", { class: "not-sent" }, "What is above is not sent any more");
    return h("article", { class: "turn", "data-turn": turn.id }, border, question, h("div", { class: "answers" }, answers));
  }

  #question(turn) {
    const buttons = h(
      "div", { class: "question-buttons" },
      copyButton("Copy message", () => turn.text),
      iconButton("edit", "Edit message", () => this.edit(turn)),
      iconButton("trash", "Delete message and answer", () => this.actions.deleteTurn(turn)),
    );
    return h("div", { class: "question" }, h("div", { class: "bubble" }, h("span", { class: "visually-hidden" }, "You: "), turn.text), buttons);
  }

  #results(turn) {
    const texts = turn.results.map(({ content }) => h("pre", { tabIndex: 0, role: "region", "aria-label": "Tool result" }, content || "(empty)"));
    const remove = iconButton("trash", "Delete results and answer", () => this.actions.deleteTurn(turn));
    return h("div", { class: "question" }, h("div", { class: "bubble results" }, h("b", {}, "Tool results"), texts), h("div", { class: "question-buttons" }, remove));
  }

  #editor(turn) {
    const area = h("textarea", { value: turn.text, rows: 3, "aria-label": "Edit your message" });
    const close = () => {
      this.replace(turn);
      byId("message").focus();
    };
    const send = () => (area.value.trim() ? this.actions.resend(turn, area.value) : close());
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    const buttons = h(
      "div", { class: "dialog-actions" },
      h("button", { type: "button", class: "button", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "button primary", onclick: send }, "Send"),
    );
    return h("div", { class: "editor" }, area, buttons);
  }

  #answerNode(turn, lane) {
    const answer = shownAnswer(turn, lane);
    const isCompared = this.conversation.lanes.length > 1;
    if (!answer) return h("section", { class: "answer absent" }, isCompared ? "Not asked here." : "No answer.");
    const label = isCompared ? `Answer ${"AB"[lane]} · ${answer.model}` : "Answer";
    const view = new AnswerView(
      {
        regenerate: () => this.actions.regenerate(turn, lane),
        showVariant: (step) => this.actions.showVariant(turn, lane, step),
        askKey: () => this.actions.askKey(turn, lane),
        canLeaveOut: () => nextToLeaveOut(this.conversation, turn) !== null,
        leaveOut: () => this.actions.leaveOut(turn, lane),
        shorten: () => this.actions.shorten(turn),
        startAnew: () => this.actions.startAnew(turn),
        sendResults: (results) => this.actions.sendResults(results),
      },
      { label },
    );
    this.#views.set(answer, { view, turn, lane });
    this.#updateAnswer(answer);
    return view.root;
  }

  #noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    // Only a reader scrolls up; text that grows just leaves the end further away.
    if (scrollHeight - scrollTop - clientHeight < NEAR_END_PX) this.#follows = true;
    else if (scrollTop < this.#lastTop) this.#follows = false;
    this.#lastTop = scrollTop;
    this.jump.hidden = this.#follows;
  }

  #keepPlace() {
    if (this.#follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.jump.hidden = this.#follows;
  }
}
