// Live updates of the page Now. The server sends the HTML of the region; elements stay where they are, so that focus,
// scroll position and clicks survive. Style sheets move the marks, unless the user prefers reduced motion.
"use strict";

const RETRY_MS = 10000;
const LEAVING_MS = 600;
const region = document.getElementById("live");
const state = document.getElementById("live-state");
let source = null;

function show(kind, text) {
  state.className = "live " + kind;
  if (state.textContent !== text) state.textContent = text;
}

function syncAttributes(old, fresh) {
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
}

function remove(node) {
  if (!node.classList?.contains("mark")) return node.remove();
  node.classList.add("gone");
  node.removeAttribute("id");
  setTimeout(() => node.remove(), LEAVING_MS);
}

const isBlank = (node) => node.nodeType === Node.TEXT_NODE && !node.data.trim();
const isKept = (node) => !isBlank(node) && !node.classList?.contains("gone");
const isSame = (old, fresh) => old.nodeName === fresh.nodeName && (old.id || "") === (fresh.id || "");

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  syncAttributes(old, fresh);
  morph(old, fresh);
}

// Makes the children of `old` equal to those of `fresh`. A child with an id is found by it, others by their place.
function morph(old, fresh) {
  const wanted = [...fresh.childNodes].filter(isKept);
  const ids = new Set(wanted.map((child) => child.id).filter(Boolean));
  for (const child of [...old.children].filter(isKept)) if (child.id && !ids.has(child.id)) remove(child);
  const byId = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  const present = [...old.childNodes].filter(isKept);
  for (const child of wanted) {
    const known = child.id ? byId.get(child.id) : present[0];
    if (!known || !isSame(known, child)) {
      old.insertBefore(child, present[0] ?? null);
      continue;
    }
    if (known === present[0]) present.shift();
    else {
      present.splice(present.indexOf(known), 1);
      old.insertBefore(known, present[0] ?? null);
    }
    update(known, child);
  }
  present.forEach(remove);
}

function connect() {
  source = new EventSource(region.dataset.events);
  source.addEventListener("now", (event) => {
    const fresh = document.createElement("template");
    fresh.innerHTML = "<div>" + event.data + "</div>";
    morph(region, document.importNode(fresh.content.firstChild, true));
    show("on", "live");
  });
  source.addEventListener("problem", (event) => show("off", event.data + "; trying again"));
  source.addEventListener("ended", () => location.reload());
  source.onerror = () => {
    show("off", "connection lost, so the figures are old; connecting again");
    if (source.readyState === EventSource.CLOSED) retryLater();
  };
}

function retryLater() {
  disconnect();
  setTimeout(follow, RETRY_MS);
}

function disconnect() {
  source?.close();
  source = null;
}

// A hidden page needs no updates, and costs the server nothing.
function follow() {
  if (document.hidden) disconnect();
  else if (!source) connect();
}

document.addEventListener("visibilitychange", follow);
addEventListener("pagehide", disconnect);
addEventListener("pageshow", follow);
follow();
