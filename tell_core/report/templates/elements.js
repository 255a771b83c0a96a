"use strict";
// Makes elements of a page, for the scripts that follow. Data only ever becomes text
// (textContent), never markup.
const SVG = (() => {
  const holder = document.createElement("template");
  holder.innerHTML = "<svg></svg>"; // its namespace is an address, and pages hold none
  return holder.content.firstChild.namespaceURI;
})();

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

