// Report pages by axe-core and by eye, at 400 and 1280 pixels, light and dark: prints violations, writes screenshots.
//
//   npm install --prefix /tmp/pages axe-core puppeteer-core       (and Chromium, as Debian packages it)
//   NODE_PATH=/tmp/pages/node_modules node tools/page_check.js runs/sst2/report.html
//
// Exit code 1 where a page has a violation or is wider than the screen.
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");

(async () => {
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox"] });
  const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
  let bad = 0;
  for (const file of process.argv.slice(2)) {
    for (const width of [400, 1280]) {
      for (const scheme of ["light", "dark"]) {
        const page = await browser.newPage();
        await page.setViewport({ width, height: 900 });
        await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
        await page.goto("file://" + path.resolve(file));
        await page.screenshot({ path: file.replace(/\.html$/, `-${width}-${scheme}.png`), fullPage: true });
        const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
        await page.evaluate(axe);
        const found = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
        const told = found.violations.map((each) => `${each.id} (${each.nodes.length}): ${each.nodes[0].html.slice(0, 120)}`);
        console.log(`${file} at ${width}, ${scheme}: ${told.length} violations, ${over} pixels too wide`, ...told);
        bad += told.length + (over > 0 ? 1 : 0);
        await page.close();
      }
    }
  }
  await browser.close();
  process.exit(bad ? 1 : 0);
})();
