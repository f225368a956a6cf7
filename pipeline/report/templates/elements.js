"use strict";
// Elements, numbers and waiting: what all scripts of the pages share.

// Texts become text nodes and attributes, never markup: they come from manifests.
const fill = (element, properties, children) => {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== ""));
  return element;
};
const make = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
const draw = (tag, properties = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

const whole = number => number.toLocaleString("en");
const fixed = (number, digits = 3) => number.toFixed(digits);
const signed = number => (number < 0 ? "−" : "+") + fixed(Math.abs(number));

const delayed = (milliseconds, call) => {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), milliseconds);
  };
};

const pathOf = (...names) => names.map(encodeURIComponent).join("/");
const linkTo = path => path.split("/").map(encodeURIComponent).join("/");
