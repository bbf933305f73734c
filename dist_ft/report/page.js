// Draws the figures of #figures in the colors of the page, also after the color scheme has changed.
(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  // Plotly's bar has a button that uploads a chart: a report stays where it is.
  const removed = ["sendChartToCloud", "lasso2d", "select2d"];
  const config = { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtonsToRemove: removed };

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line") };
    return Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), size: 12, family: style.fontFamily },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--faint"), activecolor: color("--text") },
      hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--text") } },
      xaxis: Object.assign({}, layout.xaxis, axis),
      yaxis: Object.assign({}, layout.yaxis, axis),
    });
  }

  function draw() {
    figures.forEach(function (figure, i) {
      Plotly.react("chart-" + i, figure.data, themed(figure.layout), config);
    });
  }

  if (figures.length) {
    draw();
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }
})();
