"use strict";
// Keep a form of html.py current: questions that were not asked, counters, rules of answers.
function followForm(form) {
  const value = (key) => {
    const control = form.elements[key];
    if (!control) return "";
    return control.type === "checkbox" ? String(control.checked) : control.value;
  };
  function update() {
    for (const set of form.querySelectorAll("[data-when]")) {
      set.hidden = set.disabled = !set.dataset.when.split(";").every((condition) => {
        const [key, values] = condition.split("=");
        const control = form.elements[key];
        const open = control && !(control.closest ? control : control[0]).closest("fieldset").disabled;
        return open && values.split("|").includes(value(key));
      });
    }
    form.querySelectorAll("fieldset:not(:disabled) > legend > .number").forEach((number, at) => {
      number.textContent = at + 1;
    });
    for (const box of form.querySelectorAll("textarea[data-least]")) {
      const least = Number(box.dataset.least), length = box.value.trim().length;
      const sentences = box.value.split(/[.!?]+(?:\s|$)/).filter((part) => part.trim()).length;
      box.setCustomValidity(length < least ? "Please write at least " + least + " characters." : "");
      const counted = (number, name) => number + " " + name + (number === 1 ? "" : "s");
      box.nextElementSibling.textContent = counted(sentences, "sentence") + ", " + counted(length, "character");
    }
    for (const group of form.querySelectorAll("[data-numbered]")) {
      const [least, most] = group.dataset.numbered.split(" ").map(Number);
      const controls = [...group.querySelectorAll("input, textarea")];
      const count = controls.filter((c) => (c.type === "checkbox" ? c.checked : c.value.trim())).length;
      const wrong = count < least || (most && count > most);
      if (controls[0]) controls[0].setCustomValidity(wrong ? "Please choose or change at least " + least + (most ? ", at most " + most : "") + "." : "");
    }
  }
  form.addEventListener("input", update);
  update();
  return update;
}
