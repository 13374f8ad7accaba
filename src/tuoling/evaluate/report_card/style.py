"""Style sheet and script of the report card. Fonts are the reader's own; colours keep their contrast on paper."""

from __future__ import annotations

STYLE = """
:root{--ink:#1d2430;--soft:#5d6776;--line:#e3e7ee;--paper:#fff;--ground:#f5f3ee;--after:#b4532a;--before:#c9bfae;--third:#24547a;--fourth:#7d8f4e;
--good:#1d7a4c;--bad:#b3261e;--accent:#8a3d1c;--wash:#fbf6f0}
*{box-sizing:border-box}
html{font:15px/1.6 "PingFang SC","Noto Sans CJK SC","Noto Sans SC","Microsoft YaHei",system-ui,-apple-system,
"Segoe UI","Helvetica Neue",Arial,sans-serif;color:var(--ink);background:var(--ground)}
body{margin:0}
html[data-language=zh] .en,html[data-language=en] .zh{display:none}
header{display:flex;justify-content:space-between;align-items:center;max-width:940px;margin:0 auto;padding:20px 24px 8px}
.brand{font-weight:600;letter-spacing:.06em;color:var(--accent)}
button{font:inherit;font-size:13px;padding:4px 12px;border:1px solid var(--before);border-radius:99px;
background:var(--paper);color:var(--soft);cursor:pointer}
main{max-width:940px;margin:0 auto;padding:0 24px}
section{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:20px 26px;margin:0 0 18px}
h1{font-size:27px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 12px}
h3{font-size:14px;margin:20px 0 8px;color:var(--soft);font-weight:600}
p{margin:8px 0}
.lead{color:var(--soft);margin:0 0 16px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile{background:var(--wash);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:21px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span.label,.tile small{color:var(--soft);font-size:12.5px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:right;border-bottom:1px solid var(--before);padding:5px 10px;
white-space:nowrap}
td{text-align:right;border-bottom:1px solid var(--line);padding:5px 10px;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
table.facts td{text-align:left;overflow-wrap:anywhere}
table.facts td:first-child{color:var(--soft);white-space:nowrap;width:1%;padding-right:24px}
table.wide td,table.wide th{text-align:left}
tr:last-child td{border-bottom:0}
.total td{font-weight:600;border-top:1px solid var(--before)}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}.cannot{color:var(--soft)}
.better,.worse,.cannot{white-space:nowrap}
.yes{color:var(--good)}.no{color:var(--bad)}.unknown,.conditions{color:var(--accent)}
svg.chart{width:100%;height:auto;display:block}
svg .grid{stroke:var(--line);stroke-width:1}svg .tick{font-size:11px;fill:var(--soft)}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
polyline.raw{stroke:#e3b49d;stroke-width:1}polyline.loss{stroke:var(--after)}polyline.eval{stroke:#24547a}
polyline.rate{stroke:#9aa3ae;stroke-dasharray:5 4;stroke-width:1.3}polyline.speed{stroke:#24547a}
circle.eval{fill:#24547a;stroke:#fff}
rect.before{fill:var(--before)}rect.after{fill:var(--after)}rect.third{fill:var(--third)}rect.fourth{fill:var(--fourth)}
path.whisker{stroke:var(--ink);stroke-width:1.2;fill:none;opacity:.75;vector-effect:non-scaling-stroke}
.bargrid{display:grid;grid-template-columns:max-content 1fr;gap:3px 14px;align-items:center;font-size:13px}
.bargrid svg{width:100%;height:auto;min-height:20px}.barlabel{max-width:190px;overflow-wrap:anywhere}
.bargrid{margin-bottom:14px}
.legend{font-size:12.5px;color:var(--soft);margin:4px 0 10px}
.legend i{display:inline-block;width:18px;height:10px;border-radius:2px;margin:0 6px 0 14px;vertical-align:-1px}
.legend i:first-child{margin-left:0}
.legend i.line{height:0;border-top:2.5px solid;vertical-align:4px;border-radius:0}
.legend i.dashed{border-top-style:dashed}
.note{background:var(--wash);border-left:3px solid var(--accent);padding:8px 14px;margin:10px 0;font-size:13.5px;
border-radius:0 8px 8px 0;overflow-wrap:anywhere}
.example{border:1px solid var(--line);border-radius:10px;margin:10px 0;overflow:hidden;break-inside:avoid}
.example .question{background:var(--wash);padding:9px 14px;white-space:pre-wrap;overflow-wrap:anywhere}
.example .said{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr))}
.example .said>div{padding:9px 14px;border-top:1px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere}
.example .who{display:block;color:var(--soft);font-size:12px}
.why{display:inline-block;font-size:11.5px;border-radius:99px;padding:0 9px;border:1px solid;margin-right:8px}
pre{background:#24282f;color:#f2efe9;border-radius:10px;padding:14px 16px;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,monospace;margin:8px 0}
footer{max-width:940px;margin:0 auto;padding:4px 24px 36px;color:var(--soft);font-size:12.5px}
@media (max-width:600px){section{padding:16px}main,header{padding-left:12px;padding-right:12px}
.bargrid{grid-template-columns:1fr}svg.chart{overflow:visible}svg.chart:not(.small) .tick{font-size:22px}
.interval{display:none}th,td{padding:5px 4px}}
@media print{html{background:#fff;font-size:12px}button{display:none}main,header,footer{max-width:none;padding:0}
section{border:0;border-radius:0;padding:0 0 10px;break-inside:auto}h2,h3{break-after:avoid}tr,.tile,svg{break-inside:avoid}
pre{background:#f3f1ec;color:#222;border:1px solid var(--line)}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
@page{size:A4;margin:14mm 13mm}}
"""

SCRIPT = """
document.getElementById('language').addEventListener('click',function(){
var root=document.documentElement,next=root.dataset.language==='zh'?'en':'zh';
root.dataset.language=next;root.lang=next;});
"""
