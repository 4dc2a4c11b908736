// Formulas are typeset only where Sphinx marked them; a table or a word with a dollar stays as it is.
window.MathJax = {
  options: {
    processHtmlClass: "tex2jax_process|mathjax_process|math|output_area",
    ignoreHtmlClass: "tex2jax_ignore|mathjax_ignore|document",
    menuOptions: { settings: { assistiveMml: true } },
  },
};
