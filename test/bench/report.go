package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// A Report is everything that was measured, and the JSON file.
type Report struct {
	Date      string            `json:"date"`
	Machine   []string          `json:"machine"`
	Observers []ObserverInfo    `json:"observers"`
	Loads     []LoadInfo        `json:"loads"`
	Cannot    map[string]string `json:"cannotRun,omitempty"` // observer to reason
	Runs      []Run             `json:"runs"`
}

// An ObserverInfo describes a row of the tables.
type ObserverInfo struct {
	Name     string `json:"name"`
	About    string `json:"about"`
	Versions string `json:"versions,omitempty"` // of its Debian packages
	Argv     bool   `json:"tellsArgv"`
	Exe      bool   `json:"tellsExe"`
	Contain  bool   `json:"tellsContainer"`
}

// A LoadInfo describes a load.
type LoadInfo struct {
	Name  string `json:"name"`
	About string `json:"about"`
	Runs  int    `json:"runs"`
}

// stat is the middle and the ends of some values.
type stat struct{ med, min, max float64 }

func statOf(v []float64) (stat, bool) {
	if len(v) == 0 {
		return stat{}, false
	}
	v = slices.Clone(v)
	slices.Sort(v)
	m := v[len(v)/2]
	if len(v)%2 == 0 {
		m = (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return stat{m, v[0], v[len(v)-1]}, true
}

// format writes "median (min-max)".
func format(v []float64, prec int) string {
	s, ok := statOf(v)
	if !ok {
		return "-"
	}
	if len(v) == 1 || s.min == s.max {
		return fmt.Sprintf("%.*f", prec, s.med)
	}
	return fmt.Sprintf("%.*f (%.*f-%.*f)", prec, s.med, prec, s.min, prec, s.max)
}

// A row is one observer under one load, over all repeats.
type row struct {
	argv, exe, container []float64 // percent
	cpu, kern, bpf       []float64 // ms per 1,000 execs
	p50                  []float64 // us
	ratio                []float64 // p50 to that of none in the same repeat
	peak, rss            []float64 // MB
	failed               []string
}

func (rep *Report) row(o ObserverInfo, loadName string, saturated bool) row {
	var w row
	none := map[int]float64{}
	for _, r := range rep.Runs {
		if r.Observer == "none" && r.Load == loadName && r.Saturated == saturated && r.Error == "" {
			none[r.Repeat] = float64(r.Timing.P50Ns)
		}
	}
	for _, r := range rep.Runs {
		if r.Observer != o.Name || r.Load != loadName || r.Saturated != saturated {
			continue
		}
		if r.Error != "" {
			w.failed = append(w.failed, r.Error)
			continue
		}
		n := float64(r.Timing.Execs)
		w.p50 = append(w.p50, float64(r.Timing.P50Ns)/1e3)
		if base := none[r.Repeat]; base > 0 {
			w.ratio = append(w.ratio, float64(r.Timing.P50Ns)/base)
		}
		if o.Name == "none" {
			continue
		}
		w.cpu = append(w.cpu, float64(r.CPUNs)/1e3/n)
		w.kern = append(w.kern, float64(r.KernNs)/1e3/n)
		w.bpf = append(w.bpf, float64(r.BPFNs)/1e3/n)
		w.peak = append(w.peak, float64(r.RSSPeak)/1e6)
		w.rss = append(w.rss, float64(r.RSS)/1e6)
		if o.Argv {
			w.argv = append(w.argv, 100*float64(r.Score.Argv)/n)
		}
		if o.Exe {
			w.exe = append(w.exe, 100*float64(r.Score.Exe)/n)
		}
		if o.Contain {
			w.container = append(w.container, 100*float64(r.Score.Container)/n)
		}
	}
	return w
}

// writeMarkdown writes the report for people.
func (rep *Report) writeMarkdown(w io.Writer) error {
	fmt.Fprintf(w, "Measured %s on %s; repeats: %d.\n\n", rep.Date, strings.Join(rep.Machine, "; "), rep.repeats())
	fmt.Fprintf(w, "| observer | what |\n|---|---|\n")
	for _, o := range rep.Observers {
		about := o.About
		if o.Versions != "" {
			about += " (" + o.Versions + ")"
		}
		fmt.Fprintf(w, "| %s | %s |\n", o.Name, cell(about))
	}
	for name, why := range sorted(rep.Cannot) {
		fmt.Fprintf(w, "| %s | **cannot run here**: %s |\n", name, cell(why))
	}
	fmt.Fprintln(w, `
Each cell is the median of the repeats, with minimum and maximum. *argv*: execs reported with the right arguments, as a
share of those the load made; *exe*, *container*: also with the right path and container id, where the observer tells
them ("-": it does not). *CPU*: user and system time of the observer's process per 1,000 execs; *kernel thread* and *BPF*
work for it elsewhere. *p50*: wall time of one run of the load; *ratio*: that to the run without observer of the same repeat.`)
	if d, n := rep.disturbed(); d > 0 {
		fmt.Fprintf(w, "\n**Not a quiet machine**: in %d of %d runs other programs made more than a fifth as many processes as the load.\n", d, n)
	}
	rep.writeMatrix(w, "CPU and BPF together, alone: ms per 1,000 execs", 1, func(o ObserverInfo, load string) []float64 {
		r := rep.row(o, load, false)
		for i := range r.cpu {
			r.cpu[i] += r.kern[i] + r.bpf[i]
		}
		return r.cpu
	})
	for _, l := range rep.Loads {
		rep.writeTable(w, l)
	}
	rep.writeMatrix(w, "every CPU busy: share of execs with the right arguments, %", 1, func(o ObserverInfo, load string) []float64 {
		return rep.row(o, load, true).argv
	})
	rep.writeLatency(w)
	return nil
}

// repeats is how often everything was run.
func (rep *Report) repeats() (n int) {
	for _, r := range rep.Runs {
		n = max(n, r.Repeat+1)
	}
	return n
}

// writeMatrix writes one value of each observer for each load.
func (rep *Report) writeMatrix(w io.Writer, title string, prec int, value func(ObserverInfo, string) []float64) {
	var rows []string
	for _, o := range rep.Observers {
		line, some := "| "+o.Name, false
		for _, l := range rep.Loads {
			v := value(o, l.Name)
			some = some || len(v) > 0
			line += " | " + format(v, prec)
		}
		if some {
			rows = append(rows, line+" |")
		}
	}
	if len(rows) == 0 {
		return
	}
	head := "| observer"
	for _, l := range rep.Loads {
		head += " | " + l.Name
	}
	fmt.Fprintf(w, "\n### %s\n\n%s |\n|%s\n%s\n", title, head, strings.Repeat("---|", len(rep.Loads)+1), strings.Join(rows, "\n"))
}

// disturbed counts the runs during which other programs kept the observers
// busy. The threads a load makes look foreign too, the same number in each run.
func (rep *Report) disturbed() (n, of int) {
	own := map[string]float64{} // per exec of a load
	rep.eachRun(func(r *Run, foreign float64) {
		if least, ok := own[r.Load]; !ok || foreign < least {
			own[r.Load] = foreign
		}
	})
	rep.eachRun(func(r *Run, foreign float64) {
		of++
		if foreign-own[r.Load] > 0.2 {
			n++
		}
	})
	return n, of
}

// eachRun hands over the runs of loads that ended well, with the foreign tasks per exec.
func (rep *Report) eachRun(f func(r *Run, foreign float64)) {
	for i := range rep.Runs {
		if r := &rep.Runs[i]; r.Error == "" && r.Latency == nil {
			f(r, float64(r.Foreign)/float64(max(1, r.Timing.Execs)))
		}
	}
}

func (rep *Report) writeTable(w io.Writer, l LoadInfo) {
	head := false
	for _, o := range rep.Observers {
		r := rep.row(o, l.Name, false)
		if len(r.p50) == 0 && len(r.failed) == 0 {
			continue
		}
		if !head {
			head = true
			fmt.Fprintf(w, "\n### %s, alone: %s\n\n", l.Name, l.About)
			fmt.Fprintln(w, "| observer | argv % | exe % | container % | CPU ms/1,000 | kernel thread | BPF | p50 us | ratio | RSS peak/steady MB |")
			fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|---|")
		}
		if len(r.p50) == 0 {
			fmt.Fprintf(w, "| %s | failed: %s |||||||||\n", o.Name, cell(r.failed[0]))
			continue
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", o.Name,
			format(r.argv, 1), format(r.exe, 1), format(r.container, 1), format(r.cpu, 1),
			someWork(r.kern), someWork(r.bpf), format(r.p50, 0), format(r.ratio, 2), rss(r))
	}
}

// someWork leaves out a column of zeros.
func someWork(v []float64) string {
	if s, ok := statOf(v); !ok || s.max < 0.05 {
		return "-"
	}
	return format(v, 1)
}

func rss(r row) string {
	p, ok := statOf(r.peak)
	s, _ := statOf(r.rss)
	if !ok {
		return "-"
	}
	return fmt.Sprintf("%.1f/%.1f", p.max, s.med)
}

func (rep *Report) writeLatency(w io.Writer) {
	head := false
	for _, o := range rep.Observers {
		var p50, p99, told []float64
		for _, r := range rep.Runs {
			if r.Observer == o.Name && r.Latency != nil {
				p50 = append(p50, float64(r.Latency.P50Ns)/1e6)
				p99 = append(p99, float64(r.Latency.P99Ns)/1e6)
				told = append(told, 100*float64(r.Latency.Execs)/float64(r.Timing.Execs))
			}
		}
		if len(p50) == 0 {
			continue
		}
		if !head {
			head = true
			fmt.Fprintf(w, "\n### latency: from the start of a program until its line can be read, one every 3 ms\n\n")
			fmt.Fprintln(w, "| observer | p50 ms | p99 ms | told % |")
			fmt.Fprintln(w, "|---|---|---|---|")
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", o.Name, format(p50, 2), format(p99, 2), format(told, 1))
	}
}

// cell is text that cannot break a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}

func sorted(m map[string]string) func(func(string, string) bool) {
	return func(yield func(string, string) bool) {
		var keys []string
		for k := range m {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}
