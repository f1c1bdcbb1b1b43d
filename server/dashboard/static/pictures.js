// Sample predictions: which round and which slice of a volume is shown. The choice outlives updates of the page.
"use strict";

(() => {
  let round = ""; // the one that was chosen; "" is the newest, whichever that is

  function show(block) {
    const slider = document.getElementById(`slice-${block.dataset.case}`);
    const place = slider ? slider.value : block.dataset.place;
    for (const picture of block.querySelectorAll("img")) {
      const wanted = `/samples/${round || block.dataset.newest}/${block.dataset.case}/${place}/${picture.dataset.picture}.png`;
      if (picture.getAttribute("src") !== wanted) picture.setAttribute("src", wanted);
    }
    if (slider) slider.parentElement.querySelector("output").textContent = `z = ${slider.dataset.heights.split(",")[place]}`;
  }

  const showAll = () => document.querySelectorAll(".pictures[data-case]").forEach(show);

  document.addEventListener("input", (event) => {
    if (event.target.id === "sample-round") {
      round = event.target.value;
      showAll();
    } else if (event.target.dataset.slices) show(document.querySelector(`.pictures[data-case="${event.target.dataset.slices}"]`));
  });
  document.addEventListener("part", (event) => {
    const choice = document.getElementById("sample-round");
    if (event.detail !== "samples" || !choice) return;
    if (![...choice.options].some((option) => option.value === round)) round = ""; // its pictures are not kept any more
    choice.value = round;
    showAll();
  });
})();
