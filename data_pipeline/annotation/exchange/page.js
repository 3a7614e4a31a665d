"use strict";
// The same coin as assignment.py: FNV-1a of the text's UTF-8, then the last steps of MurmurHash3.
function coin(text) {
  let state = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193) >>> 0;
  for (const [shift, factor] of [[16, 0x85ebca6b], [13, 0xc2b2ae35]])
    state = Math.imul(state ^ (state >>> shift), factor) >>> 0;
  return (state ^ (state >>> 16)) & 1;
}

function start() {
  // The requester's editor may put a form of its own around the page: browsers then drop ours.
  const form = document.getElementById("page") || document.querySelector("form"), began = Date.now();
  const asked = new URLSearchParams(location.search), own = form.id === "page";
  const assignment = document.getElementById("assignment");
  if (own) assignment.value = asked.get("assignmentId") || "";
  else assignment.remove();
  // Workers of the sandbox submit to another address.
  const to = asked.get("turkSubmitTo");
  if (own && to && /^https:\/\/[a-z]+\.mturk\.com(\/|$)/.test(to)) form.action = to.replace(/\/$/, "") + "/mturk/externalSubmit";
  const contents = ["a", "b"].map((letter) => document.getElementById("dialog" + letter));
  if (contents[0]) {
    const text = form.elements.seed.value + "/" + form.elements.item.value + "/" + (asked.get("workerId") || "");
    const exchanged = coin(text);
    if (exchanged) [contents[0].innerHTML, contents[1].innerHTML] = [contents[1].innerHTML, contents[0].innerHTML];
    form.elements.order.value = exchanged ? "1,0" : "0,1";
  }
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
    for (const box of form.querySelectorAll("textarea[data-least]")) {
      const least = Number(box.dataset.least), length = box.value.trim().length;
      const sentences = box.value.split(/[.!?]+(?:\s|$)/).filter((part) => part.trim()).length;
      box.setCustomValidity(length < least ? "Please write at least " + least + " characters." : "");
      box.nextElementSibling.textContent = sentences + " sentences, " + length + " characters";
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
  form.addEventListener("submit", () => {
    form.elements.seconds.value = ((Date.now() - began) / 1000).toFixed(1);
  });
  update();
}
if (typeof document !== "undefined") document.addEventListener("DOMContentLoaded", start);
if (typeof module !== "undefined") module.exports = { coin };
