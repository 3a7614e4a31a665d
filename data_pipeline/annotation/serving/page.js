// Keys, drafts and the minimum time of a study's pages. The server checks everything again.
function start() {
  const form = document.getElementById("form");
  if (!form) return;
  const update = followForm(form);
  const sets = () => [...form.querySelectorAll("fieldset:not(:disabled)")];
  const controls = (set) => [...set.querySelectorAll("input, textarea")];
  const choices = (set) => controls(set).filter((control) => control.matches("[type=radio], [type=checkbox]"));
  const open = (set) => controls(set).some((control) => !control.checkValidity());
  const touch = matchMedia("(pointer: coarse)").matches;

  // The number that chooses stands before each choice.
  for (const set of form.querySelectorAll("fieldset")) {
    choices(set).slice(0, 9).forEach((control, at) => {
      const key = document.createElement("kbd");
      key.textContent = at + 1;
      key.ariaHidden = "true";
      control.after(key);
    });
  }

  // Drafts: a reload, a lost connection or a restart of the server costs no text.
  const name = form.dataset.item && "draft " + location.search + " " + form.dataset.item;
  const fields = () => [...form.elements].filter((control) => control.matches("input:not([type=hidden]), textarea"));
  const read = () => { try { return JSON.parse(sessionStorage.getItem(name)); } catch { return null; } };
  const draft = name && read();
  if (draft && !document.querySelector(".alert")) {
    for (const control of fields()) {
      const value = draft[control.name];
      if (value === undefined) continue;
      if (control.type === "radio") control.checked = value === control.value;
      else if (control.type === "checkbox") control.checked = value;
      else control.value = value;
    }
    update();
  }
  const save = () => {
    const made = {};
    for (const control of fields()) {
      if (control.type === "checkbox") made[control.name] = control.checked;
      else if (control.type !== "radio" || control.checked) made[control.name] = control.value;
    }
    try {
      for (const key of Object.keys(sessionStorage))
        if (key.startsWith("draft " + location.search) && key !== name) sessionStorage.removeItem(key);
      sessionStorage.setItem(name, JSON.stringify(made));
    } catch { /* no room, or storage is switched off */ }
  };
  if (name) form.addEventListener("input", save);

  const focus = (control) => {
    control.focus({ preventScroll: true });
    (control.closest("fieldset") || control).scrollIntoView({ block: "nearest" });
  };
  const goOn = (set) => {
    const all = sets(), wrong = set && controls(set).find((control) => !control.checkValidity());
    if (wrong) { focus(wrong); wrong.reportValidity(); return; }
    const next = set ? all[all.indexOf(set) + 1] : all.find(open) || all[0];
    const target = next && (controls(next).find((control) => control.checked) || controls(next)[0]);
    focus(target || document.getElementById("send"));
  };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey || event.ctrlKey || event.metaKey) return;
    const at = event.target, writing = at.matches("textarea, input[type=text]");
    const set = at.closest("fieldset");
    if (/^[1-9]$/.test(event.key) && !writing) {
      const chosen = set || sets().find(open) || sets()[0];
      // The consent stands in no question.
      const control = (chosen ? choices(chosen) : choices(form))[Number(event.key) - 1];
      if (!control) return;
      event.preventDefault();
      focus(control);
      control.click();
    } else if (event.key === "Enter" && !event.shiftKey) {
      if (at.matches("button, summary, a") || (writing && touch) || at.closest(".feedback")) return;
      event.preventDefault();
      goOn(set);
    }
  });

  // The server checks the minimum time too.
  const ready = performance.now() + 1000 * Number(form.dataset.wait || 0), note = document.getElementById("wait");
  let sent = false;
  form.addEventListener("submit", (event) => {
    const left = Math.ceil((ready - performance.now()) / 1000);
    const answers = event.submitter?.value !== "skip";
    if (sent || (answers && left > 0)) {
      event.preventDefault();
      if (!sent) note.textContent = "Please look at the page for " + left + " more second" + (left > 1 ? "s." : ".");
      return;
    }
    sent = true;
  });
  // The back button may bring the page back as it was left.
  addEventListener("pageshow", () => { sent = false; });
  document.querySelector(".alert")?.scrollIntoView({ block: "nearest" });
}
if (typeof document !== "undefined") start();
