// Sliders of the book's figures: `metabook.explore.Explore.html` writes what this reads.
// The last slider turns fastest, so the frame of places (i, j, ...) is i * (values of j) * ... + j * ...
function explore(box) {
  const data = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
  const picture = box.querySelector("img");
  const images = [picture.getAttribute("src"), ...data.images];
  const sliders = [...box.querySelectorAll("input[type=range]")];

  function show() {
    let place = 0;
    for (const slider of sliders) {
      const texts = JSON.parse(slider.dataset.texts);
      const at = Number(slider.value);
      place = place * texts.length + at;
      slider.setAttribute("aria-valuetext", texts[at]);
      slider.parentElement.querySelector("output").textContent = texts[at];
    }
    const [image, alt] = data.frames[place];
    picture.src = images[image];
    picture.alt = alt;
  }

  for (const slider of sliders) slider.addEventListener("input", show);
  box.querySelector(".metabook-sliders").hidden = false;
  show(); // a browser may remember where the sliders stood
}

function exploreAll() {
  document.querySelectorAll(".metabook-explore").forEach(explore);
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", exploreAll);
else exploreAll();
