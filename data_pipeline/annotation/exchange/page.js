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
  followForm(form);
  form.addEventListener("submit", () => {
    form.elements.seconds.value = ((Date.now() - began) / 1000).toFixed(1);
  });
}
if (typeof document !== "undefined") document.addEventListener("DOMContentLoaded", start);
if (typeof module !== "undefined") module.exports = { coin };
